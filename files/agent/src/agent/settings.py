"""The service's settings: AGENT_* variables for what may be seen, files for what is secret.

This is their only source. tools/agent_settings.py makes of it what the role `agent` checks, passes on and documents. It
runs where the service's dependencies are not installed: import nothing here but pydantic and the standard library.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

PREFIX = "AGENT_"
SECRET_FILE = "the path of a readable file with one non-empty line"  # noqa: S105  a sentence, not a secret
PERIODS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}


class SettingsError(Exception):
    """One line for each variable that cannot be used."""


@dataclass(frozen=True, slots=True)
class Form:
    """The form of a text.

    pattern: what the whole text matches, for Python's `re`, as Ansible has it too
    allowed: the same in words
    """

    pattern: str
    allowed: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, text: str) -> str:
        """Return the text, or raise ValueError."""
        if not re.fullmatch(self.pattern, text):
            raise ValueError
        return text


def up_to(most: int) -> str:
    """Return a pattern of the whole numbers from 1 to `most`, without leading zeros."""
    digits = str(most)
    # All that have fewer digits; those that are smaller at one place and equal before it; and the number itself.
    patterns = [f"[1-9][0-9]{{0,{len(digits) - 2}}}"] if len(digits) > 1 else []
    for place, digit in enumerate(digits):
        least = 0 if place else 1
        if int(digit) > least:
            patterns.append(f"{digits[:place]}[{least}-{int(digit) - 1}]" + "[0-9]" * (len(digits) - place - 1))
    return f"(?:{'|'.join([*patterns, digits])})"


def rate(text: str) -> tuple[int, int]:
    """Return a rate's count and its period in seconds: (5, 10) of `5/10 seconds`."""
    count, _, period = text.partition("/")
    number, _, unit = period.rpartition(" ")
    return int(count), int(number or 1) * PERIODS[unit.removesuffix("s")]


def _words(value: object) -> object:
    return tuple(word for word in re.split(r"[,\s]+", value) if word) if isinstance(value, str) else value


def _json(value: object) -> object:
    return json.loads(value or "{}") if isinstance(value, str) else value


def _strip_slashes(value: str) -> str:
    return value.rstrip("/")


def _setting(default: Any, allowed: str = "", *, doc: str = "", **constraints: Any) -> Any:
    """A field. `allowed` ends the sentence that refuses a value, unless a Form has it; `doc` is for the role."""
    return Field(default, description=doc, json_schema_extra={"allowed": allowed}, **constraints)


def _whole(default: int, least: int, most: int, description: str, *, zero: str = "", extra: str = "") -> Any:
    allowed = f"a whole number from {least}{f' ({zero})' if zero else ''} to {most}{extra}"
    return _setting(default, allowed, doc=description, ge=least, le=most)


def _seconds(default: float, least: int, most: int, description: str) -> Any:
    allowed = f"a number of seconds from {least} to {most}"
    return _setting(default, allowed, doc=description, ge=least, le=most, allow_inf_nan=False)


# The last label begins with a letter, as no number and no address does.
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_HOST_NAME = rf"(?:{_LABEL}[.])*[A-Za-z](?:[A-Za-z0-9_-]{{0,61}}[A-Za-z0-9])?"
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_URL = rf"https?://(?:{_HOST_NAME}|{_OCTET}(?:[.]{_OCTET}){{3}})(?::{up_to(65_535)})?(?:/[A-Za-z0-9._~%+:@=/-]*)?"
_RATE = f"{up_to(100_000)}/(?:second|minute|hour|day|{up_to(86_400)} seconds?|{up_to(1440)} minutes?|{up_to(24)} hours?|1 day)"
_HTTP = "an http or https URL, http(s)://host[:port][/path]"

Host = Annotated[str, Form("[A-Za-z0-9._:-]{1,255}", "a host name or an address")]
Port = Annotated[int, Field(ge=1, le=65535)]
Name = Annotated[str, Form("[!-~](?:[ -~]{0,61}[!-~])?", "1 to 63 characters of ASCII, no space at either end")]
Url = Annotated[str, Form(_URL, _HTTP), AfterValidator(_strip_slashes)]
Prompt = Annotated[str, Form(r"(?=[\s\S]*\S)[^\0]{1,20000}", "1 to 20000 characters, not all of them white space")]
Rate = Annotated[str, Form(_RATE, "a count and a period, COUNT/PERIOD, such as 60/minute or 5/10 seconds, at most 100000 and a day")]
ToolName = Annotated[str, Form("[A-Za-z0-9_-]{1,64}", "1 to 64 of the characters A-Z a-z 0-9 _ -")]
ToolPattern = Annotated[str, Form("[A-Za-z0-9_*-]{1,64}", "a tool's name, * for any characters")]
ServerName = Annotated[str, Form("[a-z0-9]{1,16}", "a name of 1 to 16 characters a-z 0-9")]
HostPattern = Annotated[
    str,
    Form(rf"[*]|(?:[*][.])?{_HOST_NAME}", "a host name, *.domain for all below a domain, or * for all"),
    AfterValidator(str.lower),
]


class SecretFile(SecretStr):
    """A secret in a file that is read again when it changes, so that a rotation restarts nothing.

    While a secret is rotated, the file with `.previous` after its name has the value that still counts beside the new one.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError, and ValueError if the file is empty or has more than one line."""
        super().__init__(_read_line(path))
        self._paths = (path, path.with_name(f"{path.name}.previous"))
        self._stamps: tuple[object, ...] = ()
        self._previous = ""

    def get_secret_value(self) -> str:
        self._refresh()
        return self._secret_value

    def get_values(self) -> tuple[str, ...]:
        """Return the values that count now, the current one first."""
        self._refresh()
        return (self._secret_value, self._previous) if self._previous else (self._secret_value,)

    def _refresh(self) -> None:
        stamps = tuple(_stamp(path) for path in self._paths)
        if stamps == self._stamps:
            return
        path, previous = self._paths
        # A file that cannot be read leaves what counted before.
        with suppress(OSError, ValueError):
            value = _read_line(path)
            text = _read_line(previous) if previous.exists() and previous.stat().st_size else ""
            self._secret_value, self._previous, self._stamps = value, text, stamps


def accepted(secret: SecretStr) -> tuple[str, ...]:
    """Return the values of a secret that count now: the current one first, then the one before it while that is rotated."""
    return secret.get_values() if isinstance(secret, SecretFile) else (secret.get_secret_value(),)


class PostgresSettings(BaseModel):
    """What `python -m agent.migrate` needs; the service itself needs more."""

    model_config = ConfigDict(frozen=True, validate_default=True)

    postgres_host: Host = _setting("postgres")
    postgres_port: Port = _setting(5432, "a port from 1 to 65535")
    postgres_db: Name = _setting("agent")
    postgres_user: Name = _setting("agent")
    postgres_password: SecretStr = _setting(..., SECRET_FILE)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """Read every field's variable, or raise one SettingsError that lists all that is wrong."""
        given: dict[str, Any] = {}
        problems: list[str] = []
        for field, info in cls.model_fields.items():
            name = variable(field, info)
            value = environ.get(name)
            if value is None:
                if info.is_required():
                    problems.append(f"{name} is not set: expected {allowed(info)}")
            elif value == "" and is_optional(info):
                given[field] = None
            elif is_secret(info):
                try:
                    given[field] = SecretFile(Path(value))
                except (OSError, ValueError) as error:
                    reason = getattr(error, "strerror", None) or error
                    problems.append(f"{name}={value!r}: {reason}: expected {allowed(info)}")
            else:
                given[field] = value
        if not problems:
            try:
                return cls.model_validate(given)
            except ValidationError as error:
                for field in dict.fromkeys(str(item["loc"][0]) for item in error.errors(include_input=False)):
                    info = cls.model_fields[field]
                    value = str(given.get(field, info.default))
                    problems.append(f"{variable(field, info)}={value[:80]!r}: expected {allowed(info)}")
        raise SettingsError("\n".join(problems))


class Settings(PostgresSettings):
    """What the service needs."""

    redis_host: Host = _setting("redis")
    redis_port: Port = _setting(6379, "a port from 1 to 65535")
    redis_user: Name = _setting("agent")
    redis_password: SecretStr = _setting(..., SECRET_FILE)

    workers: int = _whole(2, 1, 64, "Processes that answer requests. They share everything through Postgres and Redis.")
    # Without it nobody can speak for a user, and only API keys are let in.
    proxy_secret: SecretStr | None = _setting(None, SECRET_FILE, doc="What nginx proves with that it is the proxy. Generated if not given.")

    model_base_url: Url = _setting(
        "http://gateway.inference.internal:8000/v1",
        doc="Base URL of an OpenAI-compatible server to use instead of the stack's own vLLM, such as `https://api.openai.com/v1`. Empty is vLLM.",
    )
    model_name: Name = _setting(
        "agent-model",
        doc="Name of the model at `agent_model_url`. Empty is `vllm_served_name`.",
    )
    model_api_key: SecretStr | None = _setting(None, SECRET_FILE, doc="API key for `agent_model_url`. Keep it in a vault. Empty sends none.")
    model_extra_body: Annotated[dict[str, Any], BeforeValidator(_json)] = _setting(
        {},
        "a JSON object",
        doc='Parameters of the server\'s own that go with every request, such as `{"chat_template_kwargs":{"enable_thinking":false}}`.',
    )
    model_hold_seconds: float = _seconds(300, 0, 3600, "How long a turn waits for a model that is away (restart, swap) before it fails with 503.")
    max_tokens: int = _whole(1024, 1, 131_072, "Longest answer of the model, in tokens. At least 256 less than `agent_context_tokens`.")
    context_tokens: int = _whole(
        8192,
        512,
        10_000_000,
        "The model's context, prompt and answer together. What does not fit is left out, oldest first.",
        extra=", at least 256 more than AGENT_MAX_TOKENS",
    )
    # Many model servers refuse every request that offers tools unless they were told how the model writes its calls.
    tools_enabled: bool = _setting(True, "true or false")

    system_prompt: Prompt = _setting(
        "You are a helpful assistant. Use the tools when they help, and say so when you do not know.",
        doc="What the model is told before every conversation.",
    )
    temperature: float | None = _setting(
        0.2,
        "a number from 0 to 2, or nothing for the server's own",
        doc="Sampling temperature. Empty leaves it to the server, as some models take none.",
        ge=0,
        le=2,
        allow_inf_nan=False,
    )
    turn_timeout_seconds: float = _seconds(330, 1, 3600, "Time for one turn, tools and waiting included. nginx must wait longer than this.")
    turn_tokens: int = _whole(0, 0, 100_000_000, "Tokens that one turn may use in all its model calls. 0 is no limit.", zero="no limit")
    turn_tool_calls: int = _whole(32, 1, 1000, "Tool calls that one turn may make.")
    recursion_limit: int = _whole(25, 2, 200, "Steps that one turn may take. Two are a call of the model and of its tools.")
    max_message_chars: int = _whole(16_000, 1, 60_000, "Longest message, in characters.")
    openai_body_kib: int = _whole(
        2048,
        64,
        65_536,
        "Longest body of a request below `/openai/v1`, whose clients send the whole conversation each time, in KiB. nginx has the same limit.",
    )
    wrong_keys: int = _whole(20, 1, 1_000_000, "Wrong API keys in a row from one address before the next must wait; five times as many for one key's name.")
    rate_limit: Rate = _setting(
        "60/minute",
        doc="Turns that each user or API key may start, as `COUNT/second`, `COUNT/minute`, `COUNT/hour`, `COUNT/day`"
        " or with a number before the unit, `COUNT/10 seconds`. A moving window.",
    )
    tokens_per_minute: int = _whole(
        0,
        0,
        100_000_000,
        "Tokens that each user or API key may use in a minute; counted after a turn, so that the last one may go beyond. 0 is no limit.",
        zero="no limit",
    )
    concurrent_runs: int = _whole(
        16,
        0,
        10_000,
        "Turns that each user or API key may have accepted and not finished at once. 0 is no limit.",
        zero="no limit",
    )

    storage_mib: int = _whole(
        1024,
        0,
        1_000_000,
        "Storage that each user or API key may use for threads, their history and items of the store, in MiB. 0 is no limit.",
        zero="no limit",
    )
    thread_mib: int = _whole(4, 1, 64, "Largest state of one thread, all its messages together, in MiB.")

    searxng_url: Url | None = _setting(
        None,
        f"{_HTTP}, or nothing for no search tool",
        doc="Base URL of a SearXNG instance for the search tool. Empty means that there is none.",
    )
    fetch_allow: Annotated[tuple[HostPattern, ...], BeforeValidator(_words)] = _setting(
        (),
        "host names, *.domain for all below a domain or * for all, separated by commas",
        doc="Hosts that the fetch tool may read pages from, as names, `*.example.com` for all below a domain, or `*`. Empty means that there is no such tool.",
    )
    memory_enabled: bool = _setting(False, "true or false", doc="Give the agent tools that keep notes on each user across threads.")
    # Every *.py file named in `tools` is loaded from this directory.
    tools_dir: Path = _setting(Path("/etc/agent/tools"), "a directory")
    tools: Annotated[tuple[ToolName, ...], BeforeValidator(_words)] = _setting((), "names of files in AGENT_TOOLS_DIR without .py, separated by commas")
    mcp_servers: Annotated[dict[ServerName, Url], BeforeValidator(_json)] = _setting(
        {},
        'a JSON object {"name": "http(s)://host[:port][/path]"}, names of 1 to 16 characters a-z 0-9',
        doc="MCP servers (streamable HTTP) whose tools the agent offers too, as a name of 1 to 16 characters `a-z0-9` and a URL.",
    )
    tools_approval: Annotated[tuple[ToolPattern, ...], BeforeValidator(_words)] = _setting(
        (),
        "names of tools, * for any characters, separated by commas",
        doc="Names of tools that wait for a person's approval, `*` for any characters.",
    )
    tool_timeout_seconds: float = _seconds(30, 1, 3600, "Time for one tool call.")
    tool_result_chars: int = _whole(12_000, 200, 1_000_000, "Longest result of a tool that the model is given, in characters.")
    otlp_endpoint: Url | None = _setting(
        None,
        f"{_HTTP}, or nothing for no tracing",
        doc="Base URL of an OpenTelemetry collector (OTLP over HTTP). Empty means no tracing.",
    )

    @field_validator("context_tokens")
    @classmethod
    def _leaves_room_for_the_question(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("max_tokens", 0) + 256:
            raise ValueError
        return value


class RetentionSettings(PostgresSettings):
    """What `python -m agent.retention` needs."""

    retention_days: int = _whole(30, 0, 36_500, "Threads that nobody used for so many days are deleted. 0 is never.", zero="never")
    retention_checkpoints: int = _whole(20, 0, 100_000, "Checkpoints that stay of the history of every other thread. 0 is all.", zero="all")


def allowed(info: FieldInfo) -> str:
    """Return what a field's value may be, in words."""
    given = info.json_schema_extra.get("allowed") if isinstance(info.json_schema_extra, dict) else None
    return str(given or next(form.allowed for form in info.metadata if isinstance(form, Form)))


def is_optional(info: FieldInfo) -> bool:
    """Whether a field may be nothing, which an empty variable says."""
    return type(None) in get_args(info.annotation)


def is_secret(info: FieldInfo) -> bool:
    """Whether a field's variable names a file with its value."""
    return info.annotation in (SecretStr, SecretStr | None)


def variable(field: str, info: FieldInfo) -> str:
    """Return the name of a field's environment variable."""
    return f"{PREFIX}{field.upper()}{'_FILE' if is_secret(info) else ''}"


def _read_line(path: Path) -> str:
    text = path.read_text("utf-8").removesuffix("\n").removesuffix("\r")
    if not text or "\n" in text or "\0" in text:
        raise ValueError("the file is empty or has more than one line")
    return text


def _stamp(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
