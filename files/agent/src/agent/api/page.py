"""GET / and what it loads: the chat page. Files of this package, read once; nothing of a request gets into them."""

import gzip
import hashlib
from dataclasses import dataclass
from importlib import resources

from fastapi import APIRouter, Request, Response

from agent.errors import NotFound

MEDIA_TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}

HEADERS = {
    # Trusted types: even a mistake in the script could not make markup of a text.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Vary": "Accept-Encoding",
}
# The page is behind a login: no cache that others share may keep it.
ASK_EACH_TIME = "private, no-cache"
KEEP = "private, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class Asset:
    body: bytes
    zipped: bytes
    digest: str
    media_type: str
    cache_control: str

    @classmethod
    def of(cls, body: bytes, suffix: str, cache_control: str) -> "Asset":
        digest = hashlib.sha256(body).hexdigest()[:16]
        return cls(body, gzip.compress(body, mtime=0), digest, f"{MEDIA_TYPES[suffix]}; charset=utf-8", cache_control)

    def answer(self, request: Request) -> Response:
        zipped = "gzip" in request.headers.get("Accept-Encoding", "")
        # The two encodings are two representations, so their tags differ.
        tag = f'"{self.digest}-gzip"' if zipped else f'"{self.digest}"'
        headers = {**HEADERS, "Cache-Control": self.cache_control, "ETag": tag}
        asked = request.headers.get("If-None-Match", "")
        if asked.strip() == "*" or tag in {each.strip().removeprefix("W/") for each in asked.split(",")}:
            return Response(None, 304, headers)
        if zipped:
            headers["Content-Encoding"] = "gzip"
        return Response(self.zipped if zipped else self.body, headers=headers, media_type=self.media_type)


def load() -> tuple[Asset, str, dict[str, Asset]]:
    """The page, a name for the present content of its other files, and those files.

    The name is one for all, as a folder: so the modules import each other by their plain names.
    """
    files = {file.name: file.read_bytes() for file in (resources.files("agent") / "page").iterdir()}
    page = files.pop("index.html").decode()
    assets = {name: Asset.of(body, name.rpartition(".")[2], KEEP) for name, body in sorted(files.items())}
    version = hashlib.sha256("".join(f"{name} {each.digest}\n" for name, each in assets.items()).encode())
    folder = version.hexdigest()[:16]
    return Asset.of(page.replace("/assets/", f"/assets/{folder}/").encode(), "html", ASK_EACH_TIME), folder, assets


router = APIRouter(tags=["page"])
PAGE, FOLDER, ASSETS = load()


@router.get("/", response_class=Response, responses={200: {"content": {"text/html": {}}}})
async def chat_page(request: Request) -> Response:
    """The chat page, for a browser."""
    return PAGE.answer(request)


@router.get("/assets/{folder}/{name}", response_class=Response, include_in_schema=False)
async def asset(request: Request, folder: str, name: str) -> Response:
    if folder != FOLDER or name not in ASSETS:
        raise NotFound
    return ASSETS[name].answer(request)
