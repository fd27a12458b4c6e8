"""Record what vLLM itself says of published models' caches and weights, into tests/unit/data/plans.json.

The program that asks is the one that the module vllm_plan runs inside the pinned image: roles/vllm/files/ask_vllm.py.
The formulas of plugins/module_utils are held to this record. Kinds, shapes and counts of layers are vLLM's own; block sizes are those of its CPU backends.

    make record-plans                         all models, by vLLM's build for CPUs in an environment of its own
    python tools/record_plans.py NAME ...     some of them, by the vLLM of this Python; the others keep their records

What the build for CPUs is too old for can be recorded by the pinned `vllm` itself: it needs no GPU, and 9 GB of disk for what it depends on.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "roles" / "vllm" / "files"))

import ask_vllm  # noqa: E402
import record_vllm  # noqa: E402

DATA = ROOT / "tests" / "unit" / "data"
MODELS = DATA / "models"
RECORD = DATA / "plans.json"
# What of the answer is compared.
KEPT = ("architecture", "context", "weight_bytes", "layers", "groups")


def distribution() -> str:
    """Return the vLLM of this Python as NAME==VERSION."""
    for name in (ask_vllm.OTHER_DISTRIBUTION, "vllm"):
        try:
            return f"{name}=={importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise SystemExit("error: this Python has no vLLM; `make record-plans` makes an environment that has one.")


def record(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text((MODELS / f"{name}.json").read_text())
        said: dict[str, Any] = ask_vllm.answer(Path(directory), [1])["gpus"]["1"]
    return said


def main() -> None:
    by = distribution()
    if by not in record_vllm.pinned().values():
        raise SystemExit(f"error: this Python has {by}, and the collection pins {' and '.join(record_vllm.pinned().values())}.")
    ask_vllm.prepare()
    ask_vllm.load()
    before = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    kept = {name: plan for name, plan in before.items() if plan["by"] in record_vllm.pinned().values()}
    names = sys.argv[1:] or sorted(file.stem for file in MODELS.glob("*.json"))
    failed = {}
    for name in names:
        start = time.monotonic()
        said = record(name)
        print(f"{name}: {said.get('error') or said['layers']} in {time.monotonic() - start:.1f} s", flush=True)
        if "error" in said:
            failed[name] = said["error"]
        else:
            kept[name] = {"by": by} | {key: said[key] for key in KEPT}
        RECORD.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    print(f"{RECORD}: {len(kept)} models; {by} built no {', '.join(failed) or 'other'}")


if __name__ == "__main__":
    main()
