"""Write the settings that this machine's proxies and mirrors make necessary, as extra variables for Ansible.

Users behind a TLS proxy or with a private package index set the same variables in their inventory. For the demo and
the tests they come from where pip already has them: PIP_CERT or SSL_CERT_FILE, and `pip config list`.

    python3 tools/machine.py .cache/machine.json
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

# In every image the bundle of the base is the one that pip shall use.
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"


def pip_settings() -> dict[str, str]:
    """Return pip's effective settings, such as `index-url` and `find-links`, without their sections."""
    result = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        # Going on without would make image builds hang on an index that this machine does not use.
        raise SystemExit(f"error: cannot read pip's settings: {result.stderr.strip()}")
    settings = {}
    for line in result.stdout.splitlines():
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = str(ast.literal_eval(value))
    return settings


def machine_variables(settings: dict[str, str], environ: dict[str, str], directory: Path) -> dict[str, object]:
    """Return the extra variables, and write the pip.conf that they name into `directory`."""
    pip_conf = ["[global]", f"cert = {BUNDLE}"]
    if settings.get("index-url", "").startswith("http"):
        pip_conf.append(f"index-url = {settings['index-url']}")
    path = directory / "pip.conf"
    path.write_text("\n".join(pip_conf) + "\n")
    variables: dict[str, object] = {"agent_stack_pip_conf": str(path)}
    certificates = environ.get("PIP_CERT") or environ.get("SSL_CERT_FILE") or settings.get("cert")
    if certificates and Path(certificates).is_file():
        variables["agent_stack_ca_certificates"] = [certificates]
    wheels = [link for link in settings.get("find-links", "").split() if Path(link).is_dir()]
    if wheels:
        variables["agent_stack_wheel_dir"] = wheels[0]
    return variables


def main() -> None:
    target = Path(sys.argv[1]).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    variables = machine_variables(pip_settings(), dict(os.environ), target.parent)
    target.write_text(json.dumps(variables, indent=2) + "\n")


if __name__ == "__main__":
    main()
