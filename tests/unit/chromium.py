"""Chromium without a window, for a page whose scripts ask a server on this machine."""

from __future__ import annotations

import os
import subprocess
import tempfile

# As long as a page's scripts run, in time that stands still while an answer is on its way.
BUDGET_MS = 3000


def dom(url: str) -> str:
    """The page as HTML, after its scripts have run."""
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        # Whatever the page may want from elsewhere is not found.
        command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--virtual-time-budget={BUDGET_MS}"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []
        result = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout
