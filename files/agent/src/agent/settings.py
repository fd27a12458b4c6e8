"""The service's settings: AGENT_* variables for what may be seen, files for what is secret."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

import limits
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

PREFIX = "AGENT_"
SECRET_FILE = "the path of a readable file with one non-empty line"  # noqa: S105  a sentence, not a secret


class SettingsError(Exception):
    """One line for each variable that cannot be used."""


def _web_address(value: str) -> str:
    parts = urlsplit(value)
    plain = value.isprintable() and " " not in value and not (parts.query or parts.fragment or parts.username)
    if not (plain and parts.scheme in {"http", "https"} and parts.hostname):
        raise ValueError
    _ = parts.port  # raises ValueError where it is no port
    return value.rstrip("/")


def _text(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise ValueError
    return value


def _rate(value: str) -> str:
    item = limits.parse(value)
    if ";" in value or "," in value or not (1 <= item.amount <= 100_000 and item.get_expiry() <= 86_400):
        raise ValueError
    return value


def _words(value: object) -> object:
    return tuple(word for word in re.split(r"[,\s]+", value) if word) if isinstance(value, str) else value


def _json(value: object) -> object:
    return json.loads(value or "{}") if isinstance(value, str) else value


def _host_pattern(value: str) -> str:
    # The last label begins with a letter, as no number or address does.
    label = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    if value != "*" and not re.fullmatch(rf"(\*\.)?({label}\.)*(?=[a-z]){label}", value.lower()):
        raise ValueError
    return value.lower()


# Each description is what the error message says is allowed.
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,255}$", description="a host name or an address")]
Port = Annotated[int, Field(ge=1, le=65535, description="a port from 1 to 65535")]
Name = Annotated[str, AfterValidator(_text), Field(max_length=63, description="1 to 63 characters")]
Url = Annotated[str, AfterValidator(_web_address), Field(description="http(s)://host[:port][/path]")]
Secret = Annotated[SecretStr, Field(description=SECRET_FILE)]
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
ToolPattern = Annotated[str, Field(pattern=r"^[A-Za-z0-9_*-]{1,64}$")]
ServerName = Annotated[str, Field(pattern=r"^[a-z0-9]{1,16}$")]
HostPattern = Annotated[str, AfterValidator(_host_pattern)]


class PostgresSettings(BaseModel):
    """What `python -m agent.migrate` needs; the service itself needs more."""

    model_config = ConfigDict(frozen=True)

    postgres_host: Host = "postgres"
    postgres_port: Port = 5432
    postgres_db: Name = "agent"
    postgres_user: Name = "agent"
    postgres_password: Secret

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """Read every field's variable, or raise one SettingsError that lists all that is wrong."""
        given: dict[str, Any] = {}
        problems: list[str] = []
        for field, info in cls.model_fields.items():
            secret = info.annotation in (SecretStr, SecretStr | None)
            value = environ.get(_variable(field, secret=secret))
            if value is None or (value == "" and info.default is None):
                if info.is_required():
                    problems.append(f"{_variable(field, secret=secret)} is not set: expected {info.description}")
                continue
            if secret:
                try:
                    given[field] = _read_secret(Path(value))
                except (OSError, ValueError) as error:
                    reason = getattr(error, "strerror", None) or error
                    problems.append(f"{_variable(field, secret=True)}={value!r}: {reason}: expected {info.description}")
            else:
                given[field] = value
        if not problems:
            try:
                return cls.model_validate(given)
            except ValidationError as error:
                for field in dict.fromkeys(str(item["loc"][0]) for item in error.errors(include_input=False)):
                    allowed = cls.model_fields[field].description
                    value = str(given.get(field, cls.model_fields[field].default))
                    problems.append(f"{_variable(field)}={value[:80]!r}: expected {allowed}")
        raise SettingsError("\n".join(problems))


class Settings(PostgresSettings):
    """What the service needs."""

    redis_host: Host = "redis"
    redis_port: Port = 6379
    redis_user: Name = "agent"
    redis_password: Secret

    model_base_url: Url = "http://gateway:8000/v1"
    model_name: Name = "agent-model"
    model_api_key: SecretStr | None = Field(None, description=SECRET_FILE)
    # Many model servers refuse every request that offers tools unless they were told how the model writes its calls.
    tools_enabled: bool = Field(True, description="true or false")
    searxng_url: Url | None = Field(None, description="http(s)://host[:port][/path], or nothing for no search tool")

    system_prompt: Annotated[str, AfterValidator(_text)] = Field(
        "You are a helpful assistant. Use your tools for calculations and for facts that you do not know. "
        "Answer in the language of the question, briefly and truthfully.",
        max_length=20_000,
        description="1 to 20000 characters",
    )
    # Some models take no temperature but their own.
    temperature: float | None = Field(
        None, ge=0, le=2, allow_inf_nan=False, description="a number from 0 to 2, or nothing for the server's own"
    )
    max_tokens: int = Field(1024, ge=1, le=131_072, description="a whole number from 1 to 131072")
    turn_timeout_seconds: float = Field(
        110, ge=1, le=3600, allow_inf_nan=False, description="a number of seconds from 1 to 3600"
    )
    recursion_limit: int = Field(25, ge=2, le=200, description="a whole number from 2 to 200")
    rate_limit: Annotated[str, AfterValidator(_rate)] = Field(
        "60/minute", description="one COUNT/PERIOD such as 60/minute or 5/10 seconds, at most 100000 and a day"
    )
    max_message_chars: int = Field(16_000, ge=1, le=60_000, description="a whole number from 1 to 60000")

    # Parameters of the server's own, such as {"chat_template_kwargs": {"enable_thinking": false}} of vLLM.
    model_extra_body: Annotated[dict[str, Any], BeforeValidator(_json)] = Field({}, description="a JSON object")
    # While the model is away (a restart, a swap), a turn waits so long before it fails; never past its own end.
    model_hold_seconds: float = Field(
        60, ge=0, le=3600, allow_inf_nan=False, description="a number of seconds from 0 to 3600"
    )
    # Of the prompt and the answer together. What does not fit is left out, oldest first.
    context_tokens: int = Field(
        8192,
        ge=512,
        le=10_000_000,
        validate_default=True,
        description="a whole number from 512 to 10000000, at least 256 more than AGENT_MAX_TOKENS",
    )
    turn_tokens: int = Field(0, ge=0, le=100_000_000, description="a whole number from 0 (no limit) to 100000000")
    turn_tool_calls: int = Field(32, ge=1, le=1000, description="a whole number from 1 to 1000")

    # Every *.py file named in `tools` is loaded from this directory.
    tools_dir: Path = Field(Path("/etc/agent/tools"), description="a directory")
    tools: Annotated[tuple[ToolName, ...], BeforeValidator(_words)] = Field(
        (), description="names of files in AGENT_TOOLS_DIR without .py, separated by commas"
    )
    tools_approval: Annotated[tuple[ToolPattern, ...], BeforeValidator(_words)] = Field(
        (), description="names of tools, * for any characters, separated by commas"
    )
    tool_timeout_seconds: float = Field(
        30, ge=1, le=3600, allow_inf_nan=False, description="a number of seconds from 1 to 3600"
    )
    tool_result_chars: int = Field(12_000, ge=200, le=1_000_000, description="a whole number from 200 to 1000000")
    mcp_servers: Annotated[dict[ServerName, Url], BeforeValidator(_json)] = Field(
        {}, description='a JSON object {"name": "http(s)://host[:port][/path]"}, names of 1 to 16 characters a-z 0-9'
    )
    fetch_allow: Annotated[tuple[HostPattern, ...], BeforeValidator(_words)] = Field(
        (), description="host names, *.domain for all below a domain or * for all, separated by commas"
    )
    memory_enabled: bool = Field(False, description="true or false")
    otlp_endpoint: Url | None = Field(None, description="http(s)://host[:port][/path], or nothing for no tracing")

    workers: int = Field(2, ge=1, le=64, description="a whole number from 1 to 64")

    # Without it nobody can speak for a user, and only API keys are let in.
    proxy_secret: SecretStr | None = Field(None, description=SECRET_FILE)
    tokens_per_minute: int = Field(0, ge=0, le=100_000_000, description="a whole number from 0 (no limit) to 100000000")
    concurrent_runs: int = Field(16, ge=0, le=10_000, description="a whole number from 0 (no limit) to 10000")

    @field_validator("context_tokens")
    @classmethod
    def _leaves_room_for_the_question(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("max_tokens", 0) + 256:
            raise ValueError
        return value


def _variable(field: str, *, secret: bool = False) -> str:
    return f"{PREFIX}{field.upper()}{'_FILE' if secret else ''}"


def _read_secret(path: Path) -> SecretStr:
    text = path.read_text("utf-8").removesuffix("\n").removesuffix("\r")
    if not text or "\n" in text or "\0" in text:
        raise ValueError("the file is empty or has more than one line")
    return SecretStr(text)
