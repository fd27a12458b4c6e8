"""Ask the registries for the digest of every image, and write roles/agent_stack/files/image-digests.json.

The lookup plugin `image` uses a digest from there for its tag. Nothing is written unless every registry answered, so the
file never holds a mix of two days.

    python tools/pin_images.py            needs Docker with Buildx, and a way to the registries
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".collections"))

from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils import _components  # noqa: E402

ROLES = ROOT / "roles"
DIGESTS = ROLES / "agent_stack" / "files" / "image-digests.json"


class PinError(Exception):
    """A registry gave no digest; the message names the image."""


def references(roles: Path) -> list[str]:
    """Return every reference with a tag that the components among some roles may pull."""
    components = _components.load(roles).values()
    images = [image["reference"] for image in _components.images(components).values() if "reference" in image]
    return sorted({*images, *_components.base_images(components).values()})


def digest(reference: str) -> str:
    """Return the digest that the registry has for a reference, for all platforms. Raises PinError."""
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", reference]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PinError(f"{reference}: {error}") from error
    found = result.stdout.strip()
    if result.returncode != 0 or not re.fullmatch(r"sha256:[0-9a-f]{64}", found):
        raise PinError(f"{reference}: {(result.stderr or result.stdout).strip() or 'no digest'}")
    return found


def main() -> int:
    try:
        digests = {reference: digest(reference) for reference in references(ROLES)}
    except PinError as error:
        print(f"error: {error}\n{DIGESTS.name} was left as it is.", file=sys.stderr)
        return 1
    DIGESTS.write_text(json.dumps(digests, indent=2) + "\n")
    print(f"{len(digests)} digests written to {DIGESTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
