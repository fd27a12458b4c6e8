"""Which followers a host removes, by what its head has written down. What removing one is, is left out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import ROOT

pytestmark = pytest.mark.play

ROLE = ROOT / "roles" / "vllm"
# As versions wrote it that did not know the port.
OLD = {"model": "m", "digest": "d", "condition": "serving", "proven": True}


@pytest.mark.parametrize(
    ("slots", "removed"),
    [
        pytest.param({"blue": OLD | {"port": 29501}, "green": OLD | {"port": 29502}}, {"vllm-29503"}, id="both models are shared"),
        pytest.param({"green": OLD | {"port": 29502}}, {"vllm-29501", "vllm-29503"}, id="one model"),
        pytest.param({"blue": OLD | {"port": 0}, "green": OLD | {"port": 29502}}, {"vllm-29501", "vllm-29503"}, id="one that is not shared"),
        pytest.param({"blue": OLD, "green": OLD | {"port": 29502}}, set(), id="one of an older version"),
        pytest.param({"blue": OLD, "green": OLD}, set(), id="both of an older version"),
        pytest.param({}, set(), id="no model"),
        pytest.param(None, set(), id="no record"),
    ],
)
def test_what_nothing_needs_is_removed(slots: dict[str, Any] | None, removed: set[str], tmp_path: Path) -> None:
    for name in ("vllm-29501", "vllm-29502", "vllm-29503", "vllm-blue", "vllm", "agent"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "data" / "vllm").mkdir(parents=True)
    if slots is not None:
        record = {"active": next(iter(slots), ""), "target": "", "strategy": "sleep", "slots": slots}
        (tmp_path / "data" / "vllm" / "swap.json").write_text(json.dumps(record))
    shutil.copy(ROLE / "tasks" / "unfollow.yml", tmp_path)
    remove = {"ansible.builtin.file": {"path": "{{ __vllm_root }}/{{ __vllm_unneeded }}", "state": "absent"}}
    (tmp_path / "unfollow_one.yml").write_text(yaml.safe_dump([remove]))
    variables = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    variables |= {"agent_stack_root": str(tmp_path / "root"), "agent_stack_data_dir": str(tmp_path / "data"), "role_path": str(ROLE)}
    groups = {"inference": {"hosts": {"head": {}}}, "followers": {"hosts": {"second": {"vllm_head": "head"}}}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"vars": variables, "children": groups}}))
    play = {"hosts": "second", "gather_facts": False, "vars_files": [str(ROLE / "vars" / "main.yml")]}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play | {"tasks": [{"ansible.builtin.import_tasks": "unfollow.yml"}]}]))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", "play.yml"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    left = {path.name for path in (tmp_path / "root").iterdir()}
    assert {"vllm-29501", "vllm-29502", "vllm-29503", "vllm-blue", "vllm", "agent"} - left == removed
