"""Programs of the project that are no modules, loaded as such."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> Any:
    """Load a program, named from the project's root. Without leaving bytecode in what may be an image's build context."""
    name = Path(path).stem
    specification = importlib.util.spec_from_file_location(name, ROOT / path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        # Its dataclasses look for it there.
        patch.setitem(sys.modules, name, module)
        patch.setattr(sys, "dont_write_bytecode", True)
        specification.loader.exec_module(module)
    return module
