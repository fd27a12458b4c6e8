"""The report as one screen of text."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from agent_stack_host.status import CERTIFICATE_DAYS, DISK_FREE_RATIO, age

GIB = 1024**3
# Where there is no answer.
NONE = "-"


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return rows with their columns under each other."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[index]) for row in rows if len(row) > index) for index in range(max(map(len, rows), default=0))]
    return ["  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def number(value: float | None, form: str = "{:.1f}") -> str:
    return NONE if value is None else form.format(value)


def render(found: dict[str, Any]) -> str:
    """Return the screen, at most a line for each thing."""
    now = time.time()
    versions = found["versions"]
    lines = [
        f"{found['verdict'].upper()}  {found['domain']}  {found['time']}",
        f"  agent_stack {versions['agent_stack']}, Docker {versions['docker'] or NONE}",
        *(f"  ! {reason}" for reason in found["reasons"]),
    ]
    for title, rows in (
        ("model", _model(found)),
        ("service", _service(found)),
        ("load", _load(found)),
        ("containers", _containers(found)),
        ("units", _units(found)),
        ("disk", _disks(found)),
        ("GPU", _gpus(found)),
        ("backup", _backup(found, now)),
        ("keys", _keys(found, now)),
    ):
        if rows:
            lines += ["", title, *table(rows)]
    return "\n".join(lines) + "\n"


def _model(found: dict[str, Any]) -> list[list[str]]:
    model = found["model"] or {"serves": "", "slots": {}}
    return [[name, "serves" if name == model["serves"] else str(slot["condition"]), str(slot["model"])] for name, slot in model["slots"].items()]


def _service(found: dict[str, Any]) -> list[list[str]]:
    if "nginx" not in found:
        return []
    certificate = found["certificate"]
    ready = found["ready"]
    says = NONE if ready is None else "ready" if ready["ready"] else f"lacks {', '.join(ready['not_ready'])}"
    days = NONE if certificate is None else f"{certificate['days']} d{'  !' if certificate['days'] < CERTIFICATE_DAYS else ''}"
    return [["nginx", str(found["nginx"] or NONE)], ["agent", says], ["certificate", days, certificate["issuer"] if certificate else ""]]


def _load(found: dict[str, Any]) -> list[list[str]]:
    load = found.get("traffic")
    if load is None:
        return []
    cache = load["model_kv_cache_ratio"]
    return [
        ["requests/min", number(load["requests_per_minute"]), "5xx/min", number(load["errors_per_minute"]), "turns/min", number(load["turns_per_minute"])],
        [
            *("turns running", number(load["turns_running"], "{:.0f}")),
            *("pending", number(load["turns_pending"], "{:.0f}")),
            *("p50, p95", f"{number(load['turn_p50_seconds'], '{:.2f}')}, {number(load['turn_p95_seconds'], '{:.2f}')} s"),
        ],
        [
            *("model running", number(load["model_running"], "{:.0f}")),
            *("waiting", number(load["model_waiting"], "{:.0f}")),
            *("p50, p95", f"{number(load['model_p50_seconds'], '{:.2f}')}, {number(load['model_p95_seconds'], '{:.2f}')} s"),
        ],
        ["tokens/s", number(load["model_tokens_per_second"]), "KV cache", number(cache, "{:.0%}")],
    ]


def _containers(found: dict[str, Any]) -> list[list[str]]:
    return [
        [container["name"], container["state"], container["health"].replace("none", ""), container["image"].rpartition("/")[2]]
        for container in found["containers"] or []
    ]


def _units(found: dict[str, Any]) -> list[list[str]]:
    return [[unit["name"], unit["state"], unit["sub"] if unit["sub"] != unit["state"] else ""] for unit in found["units"] or []]


def _disks(found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            disk["path"],
            f"{disk['free_bytes'] / GIB:.0f} of {disk['size_bytes'] / GIB:.0f} GiB free",
            "!" if disk["free_bytes"] < disk["size_bytes"] * DISK_FREE_RATIO else "",
        ]
        for disk in found["disks"] or []
    ]


def _gpus(found: dict[str, Any]) -> list[list[str]]:
    return [
        [gpu["name"], f"{number(gpu['used_mib'], '{:.0f}')} of {number(gpu['total_mib'], '{:.0f}')} MiB", f"{number(gpu['busy_percent'], '{:.0f}')} % busy"]
        for gpu in found.get("gpus") or []
    ]


def _backup(found: dict[str, Any], now: float) -> list[list[str]]:
    backup = found.get("backup")
    if not backup or not backup["metrics"]:
        return []
    return [[word, f"{age(now - backup[name])} ago" if backup[name] else "never"] for word, name in (("backup", "last"), ("restore drill", "last_drill"))]


def _keys(found: dict[str, Any], now: float) -> list[list[str]]:
    return [[key["name"], f"used {age(now - key['last_used'])} ago" if key["last_used"] else "never used"] for key in found.get("keys") or []]
