"""What rules and dashboards ask for: metrics and labels in PromQL, read well enough for the expressions of this project."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles" / "monitoring"
CONTRACT = ROLE / "files" / "metrics.yml"
DASHBOARDS = sorted((ROLE / "files" / "dashboards").glob("*.json"))
EVERYWHERE = {"job", "instance", "host", "le"}
SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum"), "untyped": ("",)}

TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')
LABELS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")
NAME = re.compile(r"(?<![\w:$])([a-zA-Z_:][\w:]*)(?!\s*\()(?![\w:])")
WORDS = {"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring", "group_left", "group_right", "m", "h", "d", "s"}


@dataclass
class Asked:
    """What one expression names: metrics with the labels that it selects them by, and the labels that it groups by."""

    metrics: dict[str, set[str]] = field(default_factory=dict)
    grouped: set[str] = field(default_factory=set)


def asked(expression: str) -> Asked:
    result = Asked()
    # First without texts, which may hold anything.
    bare = TEXT.sub('""', expression)
    for names in LABELS.findall(bare):
        result.grouped |= {name.strip() for name in names.split(",") if name.strip()}
    bare = LABELS.sub(" ", bare)
    for name, matchers in SELECTOR.findall(bare):
        result.metrics.setdefault(name, set()).update(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
    bare = re.sub(r"\{[^}]*\}", "", re.sub(r"\[[^\]]*\]", "", bare))
    for name in NAME.findall(bare):
        if name not in WORDS and not re.fullmatch(r"\d\w*|e\d+", name):
            result.metrics.setdefault(name, set())
    return result


def defaults() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())
    return loaded


def rules() -> list[dict[str, Any]]:
    """The role's rules with its defaults."""
    text = (ROLE / "templates" / "rules.yml.j2").read_text().partition("\n")[2]
    environment = jinja2.Environment(variable_start_string="[[", variable_end_string="]]", undefined=jinja2.StrictUndefined, trim_blocks=True)  # noqa: S701  no HTML
    environment.filters["comment"] = lambda words: f"# {words}"
    loaded = yaml.safe_load(environment.from_string(text).render(ansible_managed="managed", **defaults()))
    return [rule for group in loaded["groups"] for rule in group["rules"]]


def panels(path: Path) -> list[dict[str, Any]]:
    """Those that show something."""
    return [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]


def panel_expressions(path: Path) -> list[tuple[str, str]]:
    """Title and expression of every panel and annotation."""
    notes = [("annotation " + note["name"], note["expr"]) for note in json.loads(path.read_text())["annotations"]["list"]]
    return [(panel["title"], target["expr"]) for panel in panels(path) for target in panel["targets"]] + notes


def contract() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(CONTRACT.read_text())
    return loaded


def exported(name: str, metrics: dict[str, dict[str, Any]]) -> str | None:
    """The contract's name of what an expression calls so, or None."""
    if name in metrics and metrics[name]["type"] != "histogram":
        return name
    base = next((name.removesuffix(suffix) for suffix in SUFFIXES["histogram"] if name.endswith(suffix)), "")
    return base if base in metrics and metrics[base]["type"] == "histogram" else None
