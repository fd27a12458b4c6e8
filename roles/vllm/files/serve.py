"""Run vLLM; where a swap says so, import it first and wait for the GPU. Standard library only; it runs inside vLLM's container.

    serve.py ARGUMENT ...    the arguments of the program `vllm`

While GATE/wait is there, vLLM is imported and then waits until that file is gone, and GATE/imported says so. A swap starts the next model like that while
the other one still has the GPU and serves, because importing takes a large part of a start.

vLLM runs in this very process, so that the engine's, which is forked from it, finds everything imported as well.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import runpy
import shutil
import sys
import time
from pathlib import Path

GATE = Path(os.environ.get("SERVE_GATE", "/run/agent-stack"))
# What the server and its engine import. One that another version does not have is imported when it is needed.
MODULES = ("vllm.entrypoints.cli.main", "vllm.entrypoints.openai.api_server", "vllm.v1.engine.core", "vllm.v1.worker.gpu_worker")
LOOK_SECONDS = 0.1


def import_vllm() -> bool:
    """Import what is there. Return whether vLLM is a package of this Python's, and not a program of another one's."""
    # Nothing of what is imported becomes garbage, and looking for it takes a quarter of the time. The forked engine shares what is frozen.
    gc.disable()
    found = []
    for name in MODULES:
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(name))
    gc.freeze()
    gc.enable()
    return bool(found)


def wait() -> None:
    """Wait as long as the swap wants it. It cannot say so to a process that was not started by it: then the file is not there."""
    if not (GATE / "wait").exists():
        return
    (GATE / "imported").touch()
    while (GATE / "wait").exists():
        time.sleep(LOOK_SECONDS)


def main() -> None:
    program = shutil.which("vllm")
    if program is None:
        sys.exit("error: this image has no program `vllm`")
    imported = import_vllm()
    wait()
    if not imported:
        os.execv(program, [program, *sys.argv[1:]])  # noqa: S606  what the image calls vLLM, with the arguments of its container
    sys.argv[0] = program
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
