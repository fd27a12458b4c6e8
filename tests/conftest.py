"""Make the checkout importable under its collection name, as ansible.cfg does for Ansible."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / ".collections"), str(ROOT / "tools"), str(ROOT / "tests" / "host"), str(ROOT / "tests" / "swap")]
