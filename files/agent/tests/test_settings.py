import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from starlette.datastructures import Headers

from agent.access.auth import Proxy
from agent.settings import SecretFile, Settings, SettingsError, accepted, rate, up_to
from agent.storage.postgres import conninfo
from servers import AGENT, ODD_PASSWORD


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    secret = tmp_path / "secret"
    secret.write_text(ODD_PASSWORD + "\n")
    return {"AGENT_POSTGRES_PASSWORD_FILE": str(secret), "AGENT_REDIS_PASSWORD_FILE": str(secret)}


def test_two_secrets_are_all_that_is_required(environ: dict[str, str]) -> None:
    settings = Settings.from_environment(environ)
    assert settings.model_name == "agent-model"
    assert settings.model_base_url == "http://gateway.inference.internal:8000/v1"
    assert settings.searxng_url is None
    assert settings.redis_password.get_secret_value() == ODD_PASSWORD


def test_empty_optional_values_mean_none(environ: dict[str, str]) -> None:
    nothing = {"AGENT_SEARXNG_URL": "", "AGENT_MODEL_API_KEY_FILE": "", "AGENT_TEMPERATURE": ""}
    settings = Settings.from_environment(environ | nothing)
    assert settings.searxng_url is None
    assert settings.temperature is None
    assert settings.model_api_key is None


def test_odd_passwords_survive_the_connection_string(environ: dict[str, str]) -> None:
    parsed = psycopg.conninfo.conninfo_to_dict(conninfo(Settings.from_environment(environ)))
    assert parsed["password"] == ODD_PASSWORD


def test_secrets_do_not_show(environ: dict[str, str]) -> None:
    assert ODD_PASSWORD not in repr(Settings.from_environment(environ))


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("AGENT_POSTGRES_PORT", "0", "a port from 1 to 65535"),
        ("AGENT_POSTGRES_PORT", "70000", "a port from 1 to 65535"),
        ("AGENT_POSTGRES_PORT", "80; x", "a port from 1 to 65535"),
        ("AGENT_POSTGRES_PORT", "", "a port from 1 to 65535"),
        ("AGENT_REDIS_PORT", "redis", "a port from 1 to 65535"),
        ("AGENT_POSTGRES_HOST", "", "a host name"),
        ("AGENT_POSTGRES_HOST", "a b", "a host name"),
        ("AGENT_REDIS_HOST", "$(id)", "a host name"),
        ("AGENT_POSTGRES_DB", " ", "1 to 63 characters"),
        ("AGENT_POSTGRES_USER", "x" * 64, "1 to 63 characters"),
        ("AGENT_MODEL_BASE_URL", "gateway:8000", "http(s)://"),
        ("AGENT_MODEL_BASE_URL", "ftp://gateway/v1", "http(s)://"),
        ("AGENT_MODEL_BASE_URL", "http://gateway:99999/v1", "http(s)://"),
        ("AGENT_MODEL_BASE_URL", "http://user:pass@gateway/v1", "http(s)://"),
        ("AGENT_MODEL_BASE_URL", "http:///v1", "http(s)://"),
        ("AGENT_MODEL_BASE_URL", "http://a b/v1", "http(s)://"),
        ("AGENT_MODEL_NAME", "", "1 to 63 characters"),
        ("AGENT_SEARXNG_URL", "file:///etc/passwd", "http(s)://"),
        ("AGENT_SEARXNG_URL", "http://search/?q=", "http(s)://"),
        ("AGENT_SYSTEM_PROMPT", "  ", "1 to 20000 characters"),
        ("AGENT_SYSTEM_PROMPT", "x" * 20_001, "1 to 20000 characters"),
        ("AGENT_TEMPERATURE", "2.5", "a number from 0 to 2"),
        ("AGENT_TEMPERATURE", "nan", "a number from 0 to 2"),
        ("AGENT_TEMPERATURE", "-1", "a number from 0 to 2"),
        ("AGENT_MAX_TOKENS", "0", "a whole number from 1"),
        ("AGENT_MAX_TOKENS", "many", "a whole number from 1"),
        ("AGENT_TURN_TIMEOUT_SECONDS", "inf", "a number of seconds from 1 to 3600"),
        ("AGENT_TURN_TIMEOUT_SECONDS", "0", "a number of seconds from 1 to 3600"),
        ("AGENT_RECURSION_LIMIT", "1", "a whole number from 2 to 200"),
        ("AGENT_OPENAI_BODY_KIB", "63", "from 64 to 65536"),
        ("AGENT_RATE_LIMIT", "lots", "COUNT/PERIOD"),
        ("AGENT_RATE_LIMIT", "", "COUNT/PERIOD"),
        ("AGENT_RATE_LIMIT", "0/minute", "COUNT/PERIOD"),
        ("AGENT_RATE_LIMIT", "5/minute;10/hour", "COUNT/PERIOD"),
        ("AGENT_RATE_LIMIT", "1000000/minute", "COUNT/PERIOD"),
        ("AGENT_RATE_LIMIT", "100001/minute", "COUNT/PERIOD"),
        ("AGENT_RATE_LIMIT", "5/2 days", "COUNT/PERIOD"),
        ("AGENT_RATE_LIMIT", "5/0 seconds", "COUNT/PERIOD"),
        ("AGENT_RATE_LIMIT", "5/fortnight", "COUNT/PERIOD"),
        ("AGENT_MAX_MESSAGE_CHARS", "100000", "a whole number from 1 to 60000"),
        ("AGENT_MODEL_HOLD_SECONDS", "-1", "a number of seconds from 0 to 3600"),
        ("AGENT_MODEL_EXTRA_BODY", "{", "a JSON object"),
        ("AGENT_MODEL_EXTRA_BODY", "[]", "a JSON object"),
        ("AGENT_CONTEXT_TOKENS", "100", "a whole number from 512"),
        ("AGENT_CONTEXT_TOKENS", "1100", "at least 256 more than AGENT_MAX_TOKENS"),
        ("AGENT_TURN_TOKENS", "-1", "0 (no limit)"),
        ("AGENT_TURN_TOOL_CALLS", "0", "a whole number from 1 to 1000"),
        ("AGENT_STORAGE_MIB", "-1", "0 (no limit)"),
        ("AGENT_THREAD_MIB", "0", "a whole number from 1 to 64"),
        ("AGENT_TOOLS_APPROVAL", "rm -rf /", "names of tools"),
        ("AGENT_TOOL_TIMEOUT_SECONDS", "0", "a number of seconds from 1 to 3600"),
        ("AGENT_TOOL_RESULT_CHARS", "10", "a whole number from 200"),
        ("AGENT_MEMORY_ENABLED", "perhaps", "true or false"),
        ("AGENT_OTLP_ENDPOINT", "collector:4318", "http(s)://"),
    ],
)
def test_a_bad_value_is_named(environ: dict[str, str], variable: str, value: str, allowed: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        Settings.from_environment(environ | {variable: value})
    assert str(refusal.value).startswith(f"{variable}={value[:80]!r}: expected ")
    assert allowed in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("60/minute", (60, 60)),
        ("5/10 seconds", (5, 10)),
        ("5/1 second", (5, 1)),
        ("100000/day", (100_000, 86_400)),
        ("1/24 hours", (1, 86_400)),
        ("1/1440 minutes", (1, 86_400)),
    ],
)
def test_a_rate_is_a_count_and_seconds(environ: dict[str, str], text: str, expected: tuple[int, int]) -> None:
    assert rate(Settings.from_environment(environ | {"AGENT_RATE_LIMIT": text}).rate_limit) == expected


@pytest.mark.parametrize("most", [1, 7, 10, 24, 1440, 65_535, 86_400, 100_000])
def test_the_pattern_of_whole_numbers_ends_where_it_should(most: int) -> None:
    matches = re.compile(up_to(most)).fullmatch
    # Every number around the powers of ten and around the end, where a digit more or less decides.
    near = {base + step for base in (0, 10, 100, 1000, 10_000, 100_000, most) for step in range(-12, 13)}
    assert [number for number in near if number >= 0 and bool(matches(str(number))) != (1 <= number <= most)] == []
    assert not any(matches(text) for text in ("", "01", "1 ", "-1", "\u0661"))


def test_a_default_that_no_longer_fits_is_named(environ: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=r"AGENT_CONTEXT_TOKENS='8192': expected .* more than AGENT_MAX_TOKENS"):
        Settings.from_environment(environ | {"AGENT_MAX_TOKENS": "9000"})


def test_all_bad_values_are_named_at_once(environ: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as refusal:
        Settings.from_environment(environ | {"AGENT_REDIS_PORT": "x", "AGENT_TEMPERATURE": "hot"})
    assert len(str(refusal.value).splitlines()) == 2


def test_missing_secrets_are_named() -> None:
    with pytest.raises(SettingsError, match="AGENT_POSTGRES_PASSWORD_FILE is not set"):
        Settings.from_environment({})


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines\n", b"nul\0", b"\xff\xfe"])
def test_an_unusable_secret_is_not_shown(environ: dict[str, str], tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as refusal:
        Settings.from_environment(environ | {"AGENT_REDIS_PASSWORD_FILE": str(file)})
    assert str(refusal.value).startswith(f"AGENT_REDIS_PASSWORD_FILE={str(file)!r}: ")
    assert "two" not in str(refusal.value)


def replace(file: Path, text: str) -> None:
    """As Ansible does: another file of the same name."""
    new = file.with_name("new")
    new.write_text(text)
    new.replace(file)


def test_a_secret_is_read_again_when_it_changes(environ: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "secret"
    secret = Settings.from_environment(environ).redis_password
    assert accepted(secret) == (ODD_PASSWORD,)
    previous = tmp_path / "secret.previous"
    steps = [
        (previous, ODD_PASSWORD, (ODD_PASSWORD, ODD_PASSWORD)),
        (file, "new\n", ("new", ODD_PASSWORD)),
        # What cannot be read leaves what counted.
        (file, "", ("new", ODD_PASSWORD)),
        (file, "two\nlines", ("new", ODD_PASSWORD)),
        (file, "new", ("new", ODD_PASSWORD)),
        (previous, "", ("new",)),
    ]
    for changed, text, counts in steps:
        replace(changed, text)
        assert accepted(secret) == counts, (changed.name, text)
    file.unlink()
    assert accepted(secret) == ("new",)
    assert "new" not in repr(secret)


def test_a_rotated_secret_of_the_proxy_counts_with_the_one_before_it(tmp_path: Path) -> None:
    file, previous = tmp_path / "secret", tmp_path / "secret.previous"
    file.write_text("old")
    proxy = Proxy(SecretFile(file))
    sent = {"old": True, "new": False}
    for changed, text, counts in [
        (previous, "old", sent),
        (file, "new", {"old": True, "new": True}),
        (previous, "", {"old": False, "new": True, "": False}),
    ]:
        replace(changed, text)
        assert {value: proxy.sent(Headers({"X-Proxy-Secret": value})) for value in counts} == counts


def test_a_missing_secret_file_is_named(environ: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file or directory"):
        Settings.from_environment(environ | {"AGENT_REDIS_PASSWORD_FILE": str(tmp_path / "none")})


@pytest.mark.parametrize("module", [["-m", "agent.migrate"], ["-m", "uvicorn", "--factory", "agent.app:from_environment"]])
def test_the_programs_end_with_a_sentence(environ: dict[str, str], module: list[str]) -> None:
    settings = environ | {"AGENT_POSTGRES_PORT": "x", "PYTHONPATH": str(AGENT / "src")}
    run = subprocess.run([sys.executable, *module], env=settings, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "AGENT_POSTGRES_PORT='x': expected a port from 1 to 65535" in run.stderr
    assert "Traceback" not in run.stdout + run.stderr


def test_the_source_tree_holds_no_private_file() -> None:
    """The image runs as a user who owns nothing."""
    for directory, _, files in os.walk(AGENT / "src"):
        for name in files:
            assert (Path(directory) / name).stat().st_mode & stat.S_IROTH
