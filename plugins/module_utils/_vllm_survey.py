# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""Which GPUs carry a model, and which models a GPU carries, before any is rented. Pure arithmetic. PRIVATE to the collection: it may change at any time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_config import GIB, PlanError, plain
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_plan import Gpu, Shape, Wish, as_awq, make_plan, plan_on, stage_of

COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Kind:
    """A kind of GPU that one can rent: what is printed on it, and what torch sees of it."""

    gb: int
    example: str
    total_mib: int
    capability: float
    nvlink: bool


# Totals are about what the driver leaves to programs; those of the B200 are not measured.
KINDS = (
    Kind(16, "RTX 4060 Ti 16 GB", 15900, 8.9, False),
    Kind(24, "L4, RTX 4090", 22560, 8.9, False),
    Kind(32, "RTX 5090", 32110, 12.0, False),
    Kind(40, "A100 40 GB", 40440, 8.0, True),
    Kind(48, "L40S, RTX 6000 Ada", 45460, 8.9, False),
    Kind(80, "H100 80 GB", 81079, 9.0, True),
    Kind(96, "RTX PRO 6000", 97250, 12.0, False),
    Kind(141, "H200", 143150, 9.0, True),
    Kind(180, "B200", 182640, 10.0, True),
    Kind(192, "B200 192 GB", 188400, 10.0, True),
)
# The context for which a model is suggested where none is asked for.
USEFUL = 8192
# Bytes a second of a fetch, at 1 Gbit/s.
FETCH_BYTES_PER_SECOND = 125_000_000


def survey(shape: Shape, disk_bytes: int | None, wish: Wish, counts: tuple[int, ...] = COUNTS) -> list[dict[str, Any]]:
    """Return what each kind and number of GPUs carries of a model, and what would make it fit where it does not. Raises PlanError."""
    found = []
    whole, on_disk = stage_of(shape, disk_bytes, wish.pipeline)
    for kind in KINDS:
        for count in counts:
            gpu = Gpu(kind.example, kind.total_mib, kind.total_mib, kind.capability)
            plan = plan_on(whole, on_disk, gpu, count, wish)
            helps = "" if plan.fits else _what_helps(whole, on_disk, gpu, count, wish)
            found.append(
                {
                    "gpus": count,
                    "gb": kind.gb,
                    "example": kind.example,
                    "link": "" if count == 1 else "NVLink" if kind.nvlink else "PCIe",
                    "fits": plan.fits,
                    "context": plan.memory.longest_context if plan.fits else 0,
                    "users": round(plan.memory.contexts, 1) if plan.fits else 0.0,
                    "reason": plan.reason,
                    "helps": helps,
                }
            )
    return found


def _what_helps(shape: Shape, disk_bytes: int | None, gpu: Gpu, count: int, wish: Wish) -> str:
    """Return the smallest change with which the model would fit on such GPUs, or nothing."""

    def longest(model: Shape, on_disk: int | None, **changed: int) -> int:
        plan = plan_on(model, on_disk, gpu, count, replace(wish, **changed))
        return plan.memory.longest_context if plan.fits else 0

    if plan_on(shape, disk_bytes, gpu, count, replace(wish, kv_element_bytes=1)).fits:
        return "a KV cache in fp8"
    for element, also in ((0, ""), (1, ", and a KV cache in fp8")):
        tokens = longest(shape, disk_bytes, context=0, **({"kv_element_bytes": element} if element else {}))
        if wish.context and tokens >= 2048:
            return f"a context of {tokens // 1024 * 1024:,}{also}"
    four_bit = as_awq(shape)
    if shape.quantization.name in ("bf16", "fp8", "int8") and longest(four_bit, None) >= (wish.context or 2048):
        return f"a 4 bit version of it ({four_bit.weight_bytes() / GIB:.0f} GiB)"
    return ""


def fetching(disk_bytes: int | None, shape: Shape, read_gib_per_second: float) -> dict[str, Any]:
    """Return what a model takes on the disk, in GiB, and how long it takes to fetch at 1 Gbit/s and to read from the disk, in seconds."""
    try:
        size = shape.weight_bytes() if disk_bytes is None else disk_bytes
    except PlanError:
        return {"disk_gib": 0.0, "fetch_seconds": 0, "read_seconds": 0}
    return {
        "disk_gib": round(size / GIB, 1),
        "fetch_seconds": round(size / FETCH_BYTES_PER_SECOND),
        "read_seconds": round(size / GIB / read_gib_per_second),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as lines of a table: those that fit, with their context and how many of it at once."""
    lines = ["GPUs                            link    longest context  at once"]
    for row in rows:
        if row["fits"]:
            name = f"{row['gpus']} x {row['gb']} GB ({row['example']})"
            lines.append(f"{name:<32}{row['link']:<8}{row['context']:>15,}{row['users']:>9.1f}")
        elif row["helps"]:
            name = f"{row['gpus']} x {row['gb']} GB ({row['example']})"
            lines.append(f"{name:<32}{row['link']:<8}with {row['helps']}")
    return lines if len(lines) > 1 else [*lines, "none of these carries it"]


# ---------------------------------------------------------------------------------------------------------- what a GPU carries


def gpus_named(text: str) -> list[Gpu]:
    """Return the GPUs that words such as `24`, `H100`, `4 x 80 GB` or `2x RTX 4090` name. Raises PlanError."""
    match = re.fullmatch(r"\s*(?:(\d{1,2})\s*[xX*]\s*)?(.+?)\s*", text)
    count, name = (int(match.group(1) or 1), match.group(2).lower()) if match else (0, "")
    size = re.fullmatch(r"(\d+)\s*(?:gb|gib|g)?", name)
    found = [kind for kind in KINDS if (int(size.group(1)) == kind.gb if size else re.search(rf"\b{re.escape(name)}\b", kind.example.lower()))]
    if count not in COUNTS or not found:
        sizes = ", ".join(str(kind.gb) for kind in KINDS)
        names = ", ".join(kind.example for kind in KINDS)
        raise PlanError(f"plan_gpu is {plain(text)}; allowed is a size in GB ({sizes}) or a name ({names}), and before it 1, 2, 4 or 8 of them, as in 2 x 24.")
    kind = found[0]
    return [Gpu(kind.example, kind.total_mib, kind.total_mib, kind.capability)] * count


def suggest(models: Iterable[tuple[dict[str, Any], Shape, str]], gpus: Sequence[Gpu], wish: Wish) -> list[dict[str, Any]]:
    """Return what each model of a catalogue carries on some GPUs, those that fit first and in the catalogue's order. Raises PlanError.

    models: the catalogue's entry, its shape and the parser of its tool calls
    """
    found = []
    for entry, shape, parser in models:
        context = min(wish.context or USEFUL, shape.max_context)
        plan = make_plan(shape, None, gpus, replace(wish, context=context, tensor_parallel=len(gpus)))
        found.append(
            {
                "model": entry["id"],
                "fits": plan.fits,
                "weights_gib": round(shape.weight_bytes() / GIB, 1),
                "context": plan.memory.longest_context if plan.fits else 0,
                "users": round(plan.memory.contexts, 1) if plan.fits else 0.0,
                "at_context": context,
                "tool_call_parser": parser,
                "gated": bool(entry["gated"]),
                "helps": "" if plan.fits else plan.advice,
            }
        )
    return sorted(found, key=lambda row: not row["fits"])


def suggestions_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return those of the rows that fit as lines of a table."""
    lines = [f"{'model':<56}{'GiB':>7}{'longest context':>17}{'at once':>9}{'tools':>7}"]
    for row in rows:
        if row["fits"]:
            tools = "yes" if row["tool_call_parser"] else "no"
            lines.append(f"{row['model']:<56}{row['weights_gib']:>7.1f}{row['context']:>17,}{row['users']:>9.1f}{tools:>7}{'  gated' if row['gated'] else ''}")
    return lines if len(lines) > 1 else [*lines, "none of the catalogue's models fits"]
