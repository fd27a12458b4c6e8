"""Make of the agent's settings.py what the role `agent` checks, passes on and documents.

    python tools/agent_settings.py write    after every change of a setting
    python tools/agent_settings.py check    fails where a file is not what `write` would make of it

settings.json is what the role reads, and has for each variable:
name, env      the role's variable, and the service's; none where only the role knows it
type           int, str, bool, list or dict, as in an argument specification; elements of a list
min, max       of a number, both allowed
pattern        not of a bool: of the whole text, or of each of a list's or a dictionary's, for Python's `re`
key_pattern    of each name in a dictionary
allowed        the pattern or the range in words; key_allowed for names
optional       whether an empty text is allowed beside what the range or pattern says
secret         whether the value must not be shown
default        the service's; not of a secret
description    for people
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "files" / "agent" / "src" / "agent" / "settings.py"
ROLE = ROOT / "roles" / "agent"
GENERATED = "Made by tools/agent_settings.py from files/agent/src/agent/settings.py: change that, and run it."

# What the stack decides and no inventory can say. `tools` follows from agent_tool_files.
FIXED = re.compile(r"(postgres|redis)_.*|tools_enabled|tools_dir")
NAMES = {"model_base_url": "agent_model_url", "tools": "agent_tool_files"}
# Nothing means the stack's own model.
OPTIONAL = {"model_base_url", "model_name"}
# Defaults that depend on other variables. {default} is the service's.
EXPRESSIONS = {
    "proxy_secret": "{{ agent_stack_secrets.agent_proxy_secret }}",
    "context_tokens": "{{ vllm_max_model_len | default(%s) }}",
}
# The service takes any line for a secret. These are also written into nginx's configuration, or into an HTTP header.
SECRETS = {
    "proxy_secret": {"pattern": "[A-Za-z0-9_-]{32,128}", "allowed": "32 to 128 letters, digits, hyphens and underscores"},
    "model_api_key": {"pattern": "[!-~]{0,512}", "allowed": "up to 512 printable ASCII characters without spaces"},
}
# What the service does not know: where each stands among the others, and what it is.
ROLES_OWN: dict[str, list[dict[str, Any]]] = {
    "first": [
        {
            "name": "agent_port",
            "type": "int",
            "min": 1024,
            "max": 65535,
            "default": 8080,
            "description": "Port on the host's loopback address that nginx passes requests to.",
        }
    ],
    "retention_checkpoints": [
        {
            "name": "agent_retention_schedule",
            "type": "str",
            "pattern": "[A-Za-z0-9*:.,/~ -]{1,100}",
            "default": "*-*-* 03:30:00",
            "allowed": "a systemd calendar event such as *-*-* 03:30:00",
            "description": "When old threads and checkpoints are deleted, as a systemd calendar event.",
        },
        {
            "name": "agent_memory_limit_mib",
            "type": "int",
            "min": 384,
            "max": 65536,
            "default": 1024,
            "description": "Memory that the container may use, in MiB.",
        },
    ],
}
# Of the role vllm, which the role needs.
REQUIRED = {
    "vllm_served_name": "Name of the model at the gateway; see the role vllm.",
    "vllm_tool_call_parser": "Parser for the model's tool calls; see the role vllm. Without one the agent offers vLLM's model no tools.",
}
# In this order, which the list above has too.
KEYS = ["name", "env", "type", "elements", "min", "max", "pattern", "key_pattern", "allowed", "key_allowed", "optional", "secret", "default", "description"]
ANY = r"[\s\S]*"
WHOLE_NUMBER = "[0-9]{1,9}"
NUMBER = "[0-9]{1,9}([.][0-9]{1,9})?"


def load() -> Any:
    """Return the settings' module, without the package that it is in: that one needs the service's dependencies."""
    specification = importlib.util.spec_from_file_location("agent_settings_source", SETTINGS)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    # The directory is an image's build context, where bytecode would be a change.
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        specification.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def entries() -> list[dict[str, Any]]:
    """Return what settings.json has, in the order of the documentation."""
    module = load()
    fields = {**module.Settings.model_fields, **module.RetentionSettings.model_fields}
    found = [complete(entry) for entry in ROLES_OWN["first"]]
    for field, info in fields.items():
        if not FIXED.fullmatch(field):
            found.append(complete(entry_of(field, info, module)))
        found += [complete(entry) for entry in ROLES_OWN.get(field, [])]
    return found


def complete(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with what every entry has, and its range in words."""
    entry = {"env": "", "optional": False, "secret": False, **entry}
    if entry["type"] == "int":
        entry = {"pattern": WHOLE_NUMBER, "allowed": f"a whole number from {entry['min']} to {entry['max']}", **entry}
    return {key: entry[key] for key in KEYS if key in entry}


def entry_of(field: str, info: Any, module: Any) -> dict[str, Any]:
    """Return the entry of a field of the service's settings."""
    found: dict[str, Any] = {
        "name": NAMES.get(field, f"agent_{field}"),
        "env": module.variable(field, info),
        "optional": module.is_optional(info) or field in OPTIONAL,
        "description": info.description,
    }
    if module.is_secret(info):
        if field not in SECRETS:
            raise SystemExit(
                f"error: settings.py has the secret {field}, of which the role does not know the form. Name its pattern in SECRETS of "
                "tools/agent_settings.py, or let FIXED match it if the role's vars/main.yml passes it on by itself."
            )
        return found | {"type": "str", "secret": True, "optional": False} | SECRETS[field]
    found["default"] = json.loads(json.dumps(info.default))
    if field == "tools":
        (form,) = forms(get_args(info.annotation)[0], module)
        return found | {
            "type": "list",
            "elements": "path",
            "pattern": f"{form.pattern}[.]py",
            "allowed": f"a file whose name is {form.allowed} and .py",
            "description": "Python files on the controller, each with a list `tools` of LangChain tools, to add to the agent's.",
        }
    kind = get_origin(info.annotation) or info.annotation
    if kind is tuple:
        (form,) = forms(get_args(info.annotation)[0], module)
        return found | {"type": "list", "elements": "str", "pattern": form.pattern, "allowed": form.allowed}
    if kind is dict:
        name, value = (forms(part, module) for part in get_args(info.annotation))
        found |= {"type": "dict", "pattern": ANY, "allowed": "a dictionary"}
        found |= {"key_pattern": name[0].pattern, "key_allowed": name[0].allowed} if name else {}
        return found | ({"pattern": value[0].pattern, "allowed": value[0].allowed} if value else {})
    if kind is bool:
        return found | {"type": "bool"}
    limits = {name: getattr(limit, attribute) for limit in info.metadata for name, attribute in (("min", "ge"), ("max", "le")) if hasattr(limit, attribute)}
    if limits and found["optional"]:
        # A text, because YAML has no number that is nothing.
        return found | {"type": "str", "pattern": NUMBER, "allowed": module.allowed(info), "default": str(info.default)} | limits
    if limits:
        # Seconds are whole ones in the inventory, though the service would take parts of them.
        return found | {"type": "int", "default": int(info.default)} | limits
    form = (forms(info.annotation, module) or [part for part in info.metadata if isinstance(part, module.Form)])[0]
    allowed = f"{form.allowed}, or nothing" if found["optional"] else form.allowed
    return found | {"type": "str", "pattern": form.pattern, "allowed": allowed, "default": "" if found["optional"] else info.default}


def forms(annotation: Any, module: Any) -> list[Any]:
    """Return the forms in an annotation, however deep: of `Url | None` that of `Url`."""
    inner = [part for argument in get_args(annotation) for part in forms(argument, module)]
    return [part for part in getattr(annotation, "__metadata__", ()) if isinstance(part, module.Form)] + inner


class Expression(str):
    """A documented default that Ansible must not template: it is one of other variables, and may be a secret."""


class Dumper(yaml.SafeDumper):
    """YAML as yamllint wants it: lists indented, and one anchor with a name."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def generate_anchor(self, node: Any) -> str:
        return "settings"


Dumper.add_representer(Expression, lambda dumper, text: dumper.represent_scalar("!unsafe", str(text), style='"'))


def defaults(entry: dict[str, Any]) -> Any:
    """Return the default of the role's variable."""
    field = entry["name"].removeprefix("agent_")
    if field in EXPRESSIONS:
        return EXPRESSIONS[field].replace("%s", str(entry.get("default")))
    return entry.get("default", "")


def option(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the entry as an option of an argument specification."""
    text = entry["description"]
    if entry["type"] == "int":
        text += f" From {entry['min']} to {entry['max']}."
    found: dict[str, Any] = {"description": markup(text), "type": entry["type"]}
    found |= {"elements": entry["elements"]} if "elements" in entry else {}
    found |= {"no_log": True} if entry["secret"] else {}
    default = defaults(entry)
    return found | {"default": Expression(default) if entry["secret"] and "{{" in default else default}


def markup(text: str) -> str:
    """Return a description in Ansible's markup: O() of a variable, C() of whatever else stands in backticks."""
    return re.sub("`([^`]+)`", lambda match: f"{'O' if re.fullmatch('(agent|vllm)_[a-z_]+', match[1]) else 'C'}({match[1]})", text)


def files() -> dict[Path, str]:
    """Return what each generated file must hold."""
    found = entries()
    settings = {entry["name"]: option(entry) for entry in found}
    required = {name: {"description": text, "type": "str", "required": True} for name, text in REQUIRED.items()}
    entry_point = {"short_description": "Run the LangGraph agent", "options": required | settings}

    def dump(data: Any) -> str:
        return f"---\n# {GENERATED}\n" + yaml.dump(data, Dumper=Dumper, sort_keys=False, width=140, allow_unicode=True)

    return {
        ROLE / "vars" / "settings.json": json.dumps(found, indent=2) + "\n",
        ROLE / "defaults" / "main.yml": dump({entry["name"]: defaults(entry) for entry in found}),
        ROLE / "meta" / "argument_specs.yml": dump({"argument_specs": {"main": entry_point, "check": entry_point}}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=["write", "check"])
    stale = [path for path, text in files().items() if not path.exists() or path.read_text() != text]
    if parser.parse_args().do == "check":
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what settings.py says: run python tools/agent_settings.py write", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(files()[path])
        print(f"{path.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
