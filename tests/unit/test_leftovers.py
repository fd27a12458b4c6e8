"""Files of earlier versions that the roles took elsewhere are removed, before the digest that decides about a restart is made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from programs import ROOT

pytestmark = pytest.mark.play

CONFIGURE = ROOT / "roles" / "vllm" / "tasks" / "configure.yml"
# As the commits 5bf09d1 and 4a49917 wrote them.
FORMER = ("secrets/hf_token", "secrets/pip.conf", "config/fetch_model.py")
PRESENT = ("config/haproxy.cfg", "fetch/fetch_model.py", "fetch/secrets/hf_token", "servers/servers.cfg")


def test_what_earlier_versions_left_goes_and_nothing_else(tmp_path: Path) -> None:
    for name in (*FORMER, *PRESENT):
        (tmp_path / "vllm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "vllm" / name).write_text(name)
    first = yaml.safe_load(CONFIGURE.read_text())[0]
    variables = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "__vllm_dir": str(tmp_path / "vllm")}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": {"one": variables}}}))
    (tmp_path / "play.yml").write_text(yaml.safe_dump([{"hosts": "all", "gather_facts": False, "tasks": [first]}]))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", "play.yml"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    said = [subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False).stdout for _ in range(2)]
    assert "changed=1 " in said[0], said[0]
    assert "changed=0 " in said[1], said[1]
    left = {str(path.relative_to(tmp_path / "vllm")) for path in (tmp_path / "vllm").rglob("*") if path.is_file()}
    assert left == set(PRESENT)


def test_no_role_writes_there_any_more() -> None:
    for file in sorted((ROOT / "roles" / "vllm").glob("tasks/*.yml")):
        text = file.read_text()
        assert "__vllm_dir }}/secrets" not in text, file
        assert "__vllm_dir }}/config/fetch_model.py" not in text, file
