"""The pure parts of tools/sanity.py, tools/importer.py and tools/cores.py."""

from __future__ import annotations

import re
from pathlib import Path

import cores
import importer
import pytest
import sanity
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = ["files/agent/src/agent/app.py", "files/agent/src/agent/api/chat.py", "files/agent/src/agent/page/page.js", "roles/vllm/files/node.py"]


@pytest.mark.parametrize(
    ("rule", "lines"),
    [
        ("", ""),
        ("# a comment", ""),
        ("roles/vllm/files/node.py pep8!skip # why", "roles/vllm/files/node.py pep8!skip # why\n"),
        ("files/agent/src/**/*.py pylint!skip # why", f"{FILES[1]} pylint!skip # why\n{FILES[0]} pylint!skip # why\n"),
        ("files/agent/src/agent/*.py pylint!skip # why", f"{FILES[0]} pylint!skip # why\n"),
    ],
)
def test_a_rule_becomes_a_line_for_each_file(rule: str, lines: str) -> None:
    assert sanity.expand(rule, FILES) == lines


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("roles/vllm/files/node.py pep8!skip", "allowed is `PATTERN TEST # REASON`"),
        ("roles/vllm/files/node.py pep8!skip # ", "allowed is `PATTERN TEST # REASON`"),
        ("roles/vllm/files/node.py # why", "allowed is `PATTERN TEST # REASON`"),
        ("roles/gone/*.py pep8!skip # why", r"names roles/gone/\*\.py, and the archive has no such file"),
        ("roles/vllm/files/nodeXpy pep8!skip # why", "has no such file"),
        ("roles/vllm/files/node?py pep8!skip # why", "has no such file"),
    ],
)
def test_a_rule_without_a_reason_or_a_file_is_refused(rule: str, said: str) -> None:
    with pytest.raises(cores.CoreError, match=said):
        sanity.expand(rule, FILES)


def test_every_line_of_every_ignore_file_has_a_reason() -> None:
    files = sorted((ROOT / "tests" / "sanity").glob("ignore-*.txt"))
    assert [file.stem for file in files] == [f"ignore-{core}" for core in cores.SUPPORTED]
    for file in files:
        assert [line for line in file.read_text().splitlines() if not re.search(r" # \S", line)] == []


def test_which_pip_ansible_test_asks_for() -> None:
    assert sanity.pip_version("    default_packages = dict(\n        pip='24.2',\n    )\n") == "24.2"
    with pytest.raises(cores.CoreError, match="does not say"):
        sanity.pip_version("pip = None")


def test_what_did_not_run_is_named_with_its_reason() -> None:
    output = """Running sanity test "pep8"
Running sanity test "pslint"
No tests applicable.
Running sanity test "shellcheck"
WARNING: Required program "shellcheck" not found.
No tests applicable.
WARNING: Skipping sanity test "import" on Python 3.9 because it could not be found.
"""
    assert sanity.not_run(output) == {
        "pslint": "the archive has no file of its kind",
        "shellcheck": "there is no program shellcheck",
        "import": "on Python 3.9 because it could not be found.",
    }


def test_pips_settings_in_a_file() -> None:
    assert sanity.pip_conf({"timeout": "60", "find-links": "/a\n/b"}) == "[global]\nfind-links = /a /b\ntimeout = 60\n"


def test_what_the_importer_complains_of() -> None:
    found = importer.complaints("Loading role x\nWARNING: one\nERROR: two\nERROR: three\nsome ERROR: in a sentence\n")
    assert found == {"ERROR": ["two", "three"], "WARNING": ["one"]}


@pytest.mark.parametrize("environ", [{"PATH": "/bin:/home/x/.pyenv/shims", "HOME": "/home/x"}, {"PATH": "/bin:/p/shims", "HOME": "/", "PYENV_ROOT": "/p"}])
def test_pyenvs_shims_are_left_out(environ: dict[str, str]) -> None:
    assert cores.search_path(environ) == "/bin"


def test_pyenvs_pythons_are_found(tmp_path: Path) -> None:
    (tmp_path / "versions" / "3.12.1" / "bin").mkdir(parents=True)
    assert cores.search_path({"PATH": "/bin", "PYENV_ROOT": str(tmp_path)}) == f"/bin:{tmp_path}/versions/3.12.1/bin"


def test_which_cores_are_meant() -> None:
    assert cores.chosen([]) == list(cores.SUPPORTED)
    assert cores.chosen(["2.20"]) == ["2.20"]
    with pytest.raises(cores.CoreError, match=r"CORE is '2.17'; allowed are 2.19, 2.20, 2.21\."):
        cores.chosen(["2.17"])


@pytest.mark.parametrize("name", cores.ENVIRONMENTS)
def test_every_environment_has_its_lock_with_the_right_core(name: str) -> None:
    lock = (cores.LOCKS / f"requirements-{name}.lock").read_text()
    assert "--hash=sha256:" in lock
    kind, _dash, core = name.partition("-")
    if kind == "core":
        assert f"\nansible-core=={core}." in lock


def test_the_oldest_core_is_what_the_collection_asks_for() -> None:
    oldest = next(iter(cores.SUPPORTED))
    assert yaml.safe_load((ROOT / "meta" / "runtime.yml").read_text()) == {"requires_ansible": f">={oldest}.0"}
    for path in (ROOT / "roles").glob("*/meta/main.yml"):
        assert yaml.safe_load(path.read_text())["galaxy_info"]["min_ansible_version"] == oldest, path


def test_the_checkout_asks_for_the_same_collections() -> None:
    wanted = yaml.safe_load((ROOT / "galaxy.yml").read_text())["dependencies"]
    assert {entry["name"]: entry["version"] for entry in yaml.safe_load((ROOT / "requirements.yml").read_text())["collections"]} == wanted


def test_the_oldest_core_comes_with_exactly_the_lower_bounds() -> None:
    """The collections of the environment in which the tests run, which is that of the oldest core."""
    ansible = re.findall(r"^ansible==(\S+)", (cores.LOCKS / f"requirements-core-{next(iter(cores.SUPPORTED))}.lock").read_text(), re.M)
    assert ansible == re.findall(r"^ansible==(\S+)", (ROOT / "requirements-dev.lock").read_text(), re.M)
    collections = Path(pytest.importorskip("ansible_collections.community").__path__[0])
    for name, bounds in yaml.safe_load((ROOT / "galaxy.yml").read_text())["dependencies"].items():
        manifest = yaml.safe_load((collections / name.partition(".")[2] / "MANIFEST.json").read_text())
        assert bounds.startswith(f">={manifest['collection_info']['version']},"), name
