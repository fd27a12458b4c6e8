"""How `playbooks/site.yml` is put together."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils import _components

SITE = Path(__file__).resolve().parents[2] / "playbooks" / "site.yml"


def test_every_play_ends_by_asking_the_model_server_for_its_gpu() -> None:
    """Whatever `--tags` say, because any role may have systemd read its units again."""
    plays = yaml.safe_load(SITE.read_text())
    serving = [play for play in plays if "selfhosted.agent_stack.vllm" in [role["role"] for role in play.get("roles", [])]]
    assert len(serving) == 2
    for play in serving:
        (last,) = play["post_tasks"]
        role = last["ansible.builtin.include_role"]
        assert (role["name"], role["tasks_from"]) == ("selfhosted.agent_stack.nvidia_toolkit", "guard")
        # A role that is included passes its tags on only where it is told to.
        assert last["tags"] == role["apply"]["tags"] == ["always"]
        assert "vllm_device == 'cuda'" in last["when"]


def test_followers_come_first_and_are_removed_last() -> None:
    """A model that hosts share starts only once all of them wait for it; what a swap may still go back to is known when it has ended."""
    _version, look, first, *_, last = yaml.safe_load(SITE.read_text())
    assert look["ansible.builtin.import_playbook"] == "check.yml"
    for play, tasks in ((first, "follow"), (last, "unfollow")):
        (task,) = play["tasks"]
        assert task["ansible.builtin.import_role"] == {"name": "selfhosted.agent_stack.vllm", "tasks_from": tasks}
        assert task["tags"] == ["vllm"]
        assert play["hosts"] == "{{ lookup('selfhosted.agent_stack.topology').followers }}"


@pytest.mark.parametrize("path", sorted(set(SITE.parent.glob("*.yml")) - {SITE.parent / "ansible_version.yml"}), ids=lambda path: path.stem)
def test_every_playbook_first_asks_for_the_version_of_ansible(path: Path) -> None:
    first = yaml.safe_load(path.read_text())[0]
    assert first["ansible.builtin.import_playbook"] == "ansible_version.yml"


def test_the_version_asked_for_is_that_of_the_collection() -> None:
    (task,) = yaml.safe_load((SITE.parents[1] / "roles/agent_stack/tasks/ansible_version.yml").read_text())
    required = yaml.safe_load((SITE.parents[1] / "meta" / "runtime.yml").read_text())["requires_ansible"]
    assert required == f">={task['vars']['__agent_stack_ansible_core']}.0"


def test_the_look_at_all_hosts_comes_before_any_change() -> None:
    """And one host that is refused keeps the others as they are."""
    _version, look = yaml.safe_load((SITE.parent / "check.yml").read_text())
    assert look["hosts"] == "{{ lookup('selfhosted.agent_stack.topology').stack }}"
    assert look["any_errors_fatal"] is True
    (task,) = look["tasks"]
    assert task["ansible.builtin.import_role"] == {"name": "selfhosted.agent_stack.agent_stack", "tasks_from": "look"}
    assert task["tags"] == ["always"]


def test_a_restore_knows_the_variables_of_every_role_that_the_stack_has() -> None:
    """But for those of the host itself: a role that is missing there is not checked before the data is replaced."""
    (site,) = (play for play in yaml.safe_load(SITE.read_text()) if play.get("name") == "Deploy the agent stack")
    (restore,) = (play for play in yaml.safe_load((SITE.parent / "restore.yml").read_text()) if play.get("name") == "Restore")
    of_the_host = {"selfhosted.agent_stack.host", "selfhosted.agent_stack.firewall"}
    assert [role["role"] for role in restore["roles"]] == [role["role"] for role in site["roles"] if role["role"] not in of_the_host]


def test_every_component_with_a_secret_that_is_rotated_has_its_part_in_the_rotation() -> None:
    secrets = _components.secret_list(_components.load(SITE.parents[1] / "roles").values())
    text = (SITE.parent / "rotate.yml").read_text()
    owners = {secret["owner"] for secret in secrets if not secret["kept"]}
    assert owners >= {"agent", "nginx_certbot", "postgres", "redis"}
    assert {owner for owner in owners if f"name: selfhosted.agent_stack.{owner}\n" not in text} == set()
