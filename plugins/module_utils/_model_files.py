# Copyright: the selfhosted.agent_stack maintainers
# Apache-2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Where a model's files are, and how large: a directory, a hub cache, or the hub itself. PRIVATE to the collection: it may change at any time.

Only config.json, the index and the headers of safetensors files are read, never weights.
"""

from __future__ import annotations

import fnmatch
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

INDEX = "model.safetensors.index.json"
# The copies of the weights in other formats, which are not fetched where there are safetensors (files/images/vllm-cpu/fetch_model.py).
OTHER_WEIGHTS = ("*.bin", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pt", "*.pth", "original/*", "consolidated*")
HEADER_LIMIT = 100_000_000
ANSWER_LIMIT = 64_000_000


class ModelError(ValueError):
    """A model that cannot be read; the message is one sentence for the user."""


@dataclass(frozen=True)
class ModelFiles:
    """`weight_bytes` is what the weights take when vLLM has loaded them, None if only the config can tell. `missing_bytes` are still to be fetched.

    `chat_template` is whether the model has one, None if nobody can tell.
    """

    config: dict[str, Any]
    weight_bytes: int | None
    missing_bytes: int
    origin: str
    revision: str
    chat_template: bool | None = None


def find_model(model: str, revision: str, directories: Iterable[Path], hub: Hub | None) -> ModelFiles:
    """Return the model from a directory, else from one of the caches, else from the hub. Raises ModelError."""
    if model.startswith("/"):
        return read_directory(Path(model), model)
    for directory in directories:
        found = in_cache(directory, model, revision)
        try:
            if found is not None:
                return read_directory(found, model)
        except ModelError:
            # A fetch that was interrupted is no reason not to plan, as long as the hub can say what is missing.
            if hub is None:
                raise
    if hub is None:
        raise ModelError(f"{model} is in none of the directories given, and the hub is not to be asked.")
    return hub.read(model, revision)


def in_cache(directory: Path, model: str, revision: str) -> Path | None:
    """Return the model's directory below a hub cache (models--OWNER--NAME/snapshots/COMMIT) or a directory of models, if it is complete there."""
    wanted = revision or "main"
    for root in (directory, directory / "hub"):
        repository = root / f"models--{model.replace('/', '--')}"
        reference = repository / "refs" / wanted
        commit = reference.read_text().strip() if reference.is_file() else wanted
        if (repository / "snapshots" / commit / "config.json").is_file():
            return repository / "snapshots" / commit
    # As the role vllm names them.
    own = directory / re.sub(r"[^A-Za-z0-9._-]+", "--", f"{model}@{wanted}")
    return own if (own / "config.json").is_file() else None


def read_directory(directory: Path, name: str) -> ModelFiles:
    """Return the model in a directory. Raises ModelError."""
    try:
        config = parse_json((directory / "config.json").read_bytes(), f"config.json in {directory}")
    except FileNotFoundError:
        what = "has no config.json" if directory.is_dir() else "does not exist"
        raise ModelError(f"{directory} {what}, so there is no model to plan for.") from None
    except OSError as error:
        raise ModelError(f"{directory}/config.json cannot be read: {error.strerror}.") from None
    index = directory / INDEX
    if index.is_file():
        files = index_files(index.read_bytes(), name)
        absent = [file for file in files if not (directory / file).is_file()]
        if absent:
            raise ModelError(f"the safetensors index of {name} names {len(absent)} files that are not there, such as {absent[0]}.")
    else:
        every = sorted(file.name for file in directory.glob("*.safetensors"))
        files = [file for file in every if not file.startswith("consolidated")] or every
    if not files:
        return ModelFiles(config, None, 0, str(directory), "")
    return ModelFiles(config, sum(tensor_bytes(header(directory / file), config) for file in files), 0, str(directory), "")


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        raise ModelError(f"{what} is not JSON.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{what} does not hold an object.")
    return value


def index_files(text: bytes, name: str) -> list[str]:
    """Return the files that a safetensors index names. Raises ModelError."""
    weight_map = parse_json(text, f"the safetensors index of {name}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"the safetensors index of {name} has no weight_map.")
    files = sorted({str(file) for file in weight_map.values()})
    outside = [file for file in files if "/" in file or file.startswith(".")]
    if outside:
        raise ModelError(f"the safetensors index of {name} names {outside[0]!r}, which is no file beside it.")
    return files


def header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file, which is as long as its header says. Raises ModelError."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(HEADER_LIMIT, size - 8):
            raise ModelError(f"{file} is not a safetensors file, or cut short.")
        tensors = parse_json(stream.read(length), f"the header of {file}")
    tensors.pop("__metadata__", None)
    try:
        end = max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
    except (KeyError, TypeError, IndexError, ValueError):
        raise ModelError(f"the header of {file} describes a tensor without its place.") from None
    if 8 + length + end > size:
        raise ModelError(f"{file} is cut short: it has {size:,} bytes of {8 + length + end:,}.")
    return tensors


def tensor_bytes(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Return what vLLM keeps of some tensors: float32 as 16 bits unless quantised, and no layers beyond the model's (for speculative decoding)."""
    layers = config.get("num_hidden_layers")
    halved = not config.get("quantization_config")
    total = 0
    for name, tensor in tensors.items():
        number = re.match(r"model\.layers\.(\d+)\.", name)
        if number and isinstance(layers, int) and int(number.group(1)) >= layers:
            continue
        size = int(tensor["data_offsets"][1]) - int(tensor["data_offsets"][0])
        total += size // 2 if halved and tensor.get("dtype") == "F32" else size
    return total


class Hub:
    """A Hugging Face hub or a mirror of it. The token goes to it alone, not to where it redirects."""

    def __init__(self, url: str, token: str, timeout: float) -> None:
        if not url.startswith(("https://", "http://")):
            raise ModelError(f"the hub's address is {url!r}; allowed is an https URL.")
        if token and not url.startswith("https://"):
            raise ModelError(f"the hub's address is {url!r}; a token is only sent over https.")
        self.url = url.rstrip("/")
        self.token = token
        self.timeout = timeout

    def read(self, model: str, revision: str) -> ModelFiles:
        """Return the model. Raises ModelError."""
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model, re.ASCII):
            raise ModelError(f"{model!r} is neither an id on the hub, such as Qwen/Qwen3-8B, nor an absolute path.")
        wanted = quote(revision or "main", safe="")
        about = parse_json(self.get(f"/api/models/{model}/revision/{wanted}?blobs=true", model, revision), f"what the hub says about {model}")
        commit = str(about.get("sha") or revision or "main")
        sizes = {str(file.get("rfilename")): int(file.get("size") or 0) for file in about.get("siblings") or []}
        if "config.json" not in sizes:
            raise ModelError(f"{model} has no config.json on the hub, so it is no model that vLLM could serve.")
        config = parse_json(self.get(f"/{model}/resolve/{commit}/config.json", model, revision), f"config.json of {model}")
        if INDEX in sizes:
            files = index_files(self.get(f"/{model}/resolve/{commit}/{INDEX}", model, revision), model)
            absent = [file for file in files if file not in sizes]
            if absent:
                raise ModelError(f"the safetensors index of {model} names {len(absent)} files that the hub does not have, such as {absent[0]}.")
        else:
            files = [file for file in sizes if fnmatch.fnmatch(file, "*.safetensors") and "/" not in file and not file.startswith("consolidated")]
        weights = sum(sizes[file] for file in files) or None
        if weights is not None and not config.get("quantization_config"):
            weights -= float32_bytes(about) // 2
        fetched = sum(size for file, size in sizes.items() if not (files and any(fnmatch.fnmatch(file, pattern) for pattern in OTHER_WEIGHTS)))
        return ModelFiles(config, weights, fetched, self.url, commit)

    def get(self, path: str, model: str, revision: str) -> bytes:
        """Return an answer's body. Raises ModelError."""
        request = Request(self.url + path, headers={"User-Agent": "selfhosted.agent_stack"})
        if self.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        try:
            with urlopen(request, timeout=self.timeout) as answer:
                body = bytes(answer.read(ANSWER_LIMIT + 1))
        except HTTPError as error:
            raise ModelError(self.refusal(error, model, revision)) from None
        except (URLError, OSError) as error:
            raise ModelError(f"no answer from {self.url} about {model}: {getattr(error, 'reason', error)}.") from None
        if len(body) > ANSWER_LIMIT:
            raise ModelError(f"{self.url} answers with more than {ANSWER_LIMIT:,} bytes about {model}, which is no description of a model.")
        return body

    def refusal(self, error: HTTPError, model: str, revision: str) -> str:
        code = error.headers.get("X-Error-Code", "")
        if code == "RevisionNotFound":
            return f"{model} has no revision {revision or 'main'} on the hub."
        if code == "GatedRepo" or (error.code == 403 and not code):
            if self.token:
                return f"{model} is gated, and the token may not read it: accept its licence on the hub with the token's account."
            return f"{model} is gated: accept its licence on the hub and give a token that may read it."
        if error.code in (401, 404):
            hidden = "the token may not read it" if self.token else "it is private, and no token was given"
            return f"the hub has no model {model}, or {hidden}."
        return f"{self.url} answered {error.code} about {model}."


def float32_bytes(about: Mapping[str, Any]) -> int:
    parameters = (about.get("safetensors") or {}).get("parameters") or {}
    return 4 * int(parameters.get("F32") or 0)
