"""The pure parts of tools/release.py and tools/versions.py."""

from __future__ import annotations

import json

import pytest
import release
import versions
from cores import CoreError

CLEAN = ("0.2.0", ["0.1.0"], "", ["x.yml"])


@pytest.mark.parametrize("version", ["0.2.0", "0.2.1", "0.10.0", "1.0.0"])
def test_a_newer_version_is_released(version: str) -> None:
    assert release.refusal(version, *CLEAN) == ""


@pytest.mark.parametrize(
    ("version", "state", "said"),
    [
        ("1.0", CLEAN, "VERSION is '1.0'; allowed is MAJOR.MINOR.PATCH, such as 1.2.0."),
        ("v1.0.0", CLEAN, "VERSION is 'v1.0.0'; allowed is"),
        ("01.0.0", CLEAN, "VERSION is '01.0.0'; allowed is"),
        ("0.1.0", CLEAN, "VERSION is '0.1.0', and 0.1.0 is released; allowed is a newer one."),
        ("0.9.0", ("0.10.0", ["0.1.0", "0.10.0"], "", ["x.yml"]), "VERSION is '0.9.0', and 0.10.0 is released"),
        ("0.1.5", CLEAN, "VERSION is '0.1.5', and galaxy.yml already has 0.2.0; allowed is that or a newer one."),
        ("0.2.0", ("0.2.0", ["0.1.0"], " M galaxy.yml\n?? x\n", ["x.yml"]), "changes that are not committed, such as galaxy.yml;"),
        ("0.2.0", ("0.2.0", ["0.1.0"], "", []), "there is nothing to release"),
    ],
)
def test_what_is_refused(version: str, state: tuple[str, list[str], str, list[str]], said: str) -> None:
    assert said in release.refusal(version, *state)


def test_the_version_in_galaxy_yml() -> None:
    assert release.with_version("name: x\nversion: 0.2.0\nreadme: y\n", "1.0.0") == "name: x\nversion: 1.0.0\nreadme: y\n"
    for text in ("name: x\n", "version: 1.0.0\nversion: 1.0.0\n"):
        with pytest.raises(CoreError, match="allowed is one"):
            release.with_version(text, "2.0.0")


def test_only_what_is_new_in_the_release_gets_its_version() -> None:
    text = "version_added: 0.1.0\n  version_added: 0.2.0\n# version_added: 0.2.0 was\n"
    assert release.with_added(text, "0.2.0", "1.0.0") == "version_added: 0.1.0\n  version_added: 1.0.0\n# version_added: 0.2.0 was\n"


def test_what_has_no_documentation_is_named() -> None:
    versions.documented(json.dumps({"a": {"doc": {}}}), ["a"])
    with pytest.raises(CoreError, match="nothing on b, c"):
        versions.documented(json.dumps({"a": {"doc": {}}, "b": {}}), ["c", "b", "a"])


def test_deprecations_are_whole_sentences() -> None:
    output = (
        "PLAY [x] ***\n\x1b[0;35m[DEPRECATION WARNING]: This goes. It will be removed\nin version 2.23.\x1b[0m\n\nTASK [y] ***\n"
        "[DEPRECATION WARNING]: So does this.\n[WARNING]: not this\n"
    )
    assert versions.deprecations(output) == ["This goes. It will be removed in version 2.23.", "So does this."]
    assert versions.deprecations("[WARNING]: nothing\n") == []


SENTENCE = "This is ansible-core 2.18.1; selfhosted.agent_stack needs 2.19 or newer."
REFUSED = f"TASK [Require] ***\nfatal: [x]: FAILED! => msg: {SENTENCE}\nPLAY RECAP\nx : ok=0    changed=0    unreachable=0    failed=1\n"


def test_an_old_core_is_refused_by_the_first_task() -> None:
    assert versions.refusal(REFUSED, "2.18.1") == SENTENCE


@pytest.mark.parametrize(
    "output",
    [
        REFUSED.replace("2.18.1", "2.18.2"),
        f"TASK [Gathering Facts] ***\nok: [x]\n{REFUSED}",
        REFUSED.replace("ok=0 ", "ok=1 "),
        REFUSED.replace("changed=0", "changed=1"),
        "[ERROR]: couldn't resolve module/action",
    ],
)
def test_anything_else_is_no_refusal(output: str) -> None:
    with pytest.raises(CoreError, match=r"ansible-core 2\.18\.1 is not refused by the first task"):
        versions.refusal(output, "2.18.1")


def test_the_plugins_tests_are_found() -> None:
    found = versions.plugin_tests()
    assert {"tests/unit/test_vllm_plan.py", "tests/unit/test_generated_secrets.py", "tests/unit/test_file_tree.py"} <= set(found)
