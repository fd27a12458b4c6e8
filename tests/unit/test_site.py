"""How `playbooks/site.yml` is put together."""

from __future__ import annotations

from pathlib import Path

import yaml

SITE = Path(__file__).resolve().parents[2] / "playbooks" / "site.yml"


def test_every_play_ends_by_asking_the_model_server_for_its_gpu() -> None:
    """Whatever `--tags` say, because any role may have systemd read its units again."""
    plays = yaml.safe_load(SITE.read_text())
    assert len(plays) == 2
    for play in plays:
        (last,) = play["post_tasks"]
        role = last["ansible.builtin.include_role"]
        assert (role["name"], role["tasks_from"]) == ("selfhosted.agent_stack.nvidia_toolkit", "guard")
        # A role that is included passes its tags on only where it is told to.
        assert last["tags"] == role["apply"]["tags"] == ["always"]
        assert "vllm_device == 'cuda'" in last["when"]
