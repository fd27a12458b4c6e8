# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""How to change from the model that serves to a planned one, the cheapest way first. Pure arithmetic. PRIVATE to the collection: it may change at any time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_config import GIB, MIB
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_plan import Plan

# What a sleeping engine keeps on its GPU: the CUDA context and what its own allocator does not manage. Seen: 1,889 and 2,003 MiB.
ASLEEP_MIB = 2050
# An engine holds a little more than its share (850 MiB seen), which is not another program's.
FOREIGN_TOLERANCE_MIB = 1024


@dataclass(frozen=True)
class Running:
    """The model that serves now: what its process holds on each GPU, and whether it can be put to sleep.

    `slept_before` says that the host's memory for its weights is pinned already.
    """

    name: str
    used_mib: int
    weights_mib: int
    sleep_mode: bool = False
    slept_before: bool = False


@dataclass(frozen=True)
class Serving:
    """What serves, and whether the planned model waits beside it for a rollback: loaded before, and perhaps asleep."""

    running: Running | None = None
    asleep: bool = False
    loaded_before: bool = False


def read_serving(found: dict[str, Any], model: str, total_mib: int) -> Serving:
    """Return what the module vllm_swap says of its slots, for a model that is planned on GPUs of this size.

    A slot holds the share that it was started with, so that what other programs hold on the GPU is seen.
    """
    slots = dict(found.get("slots") or {})
    active = slots.pop(found.get("active") or "", None)
    if active is None:
        return Serving()
    standby: dict[str, Any] = next(iter(slots.values()), {})
    condition = str(standby.get("condition"))
    beside = {"asleep": ASLEEP_MIB, "running": int(standby.get("utilization", 0) * total_mib)}.get(condition, 0)
    used = int(active["utilization"] * total_mib) + beside
    known = standby.get("model") == model
    running = Running(active["model"], used, active["weights_mib"], active["sleep_mode"], active["slept_before"])
    return Serving(running, known and condition == "asleep", known)


@dataclass(frozen=True)
class Swap:
    strategy: str  # start, side_by_side, sleep, hold_and_recreate or none
    hold_seconds: float
    reason: str
    utilization: float


@dataclass(frozen=True)
class Timings:
    """Seconds seen on an H100 (vLLM 0.26, Llama 3.1 8B in bf16, 15 GiB of weights)."""

    # A first sleep at level 1 that nobody paid for ahead pins host memory for the weights: 10.1 and 16.2 s. It stays pinned, so the next sleep took 0.4 s.
    first_sleep_per_gib: float = 1.05
    later_sleep_per_gib: float = 0.03
    wake_per_gib: float = 0.04  # 0.5 and 0.6 s
    stop: float = 2.5
    load_warm: float = 75.0  # compile cache kept
    load_cold: float = 135.0
    read_gib_per_second: float = 1.0  # weights from the disk; an assumption


def plan_swap(plan: Plan, serving: Serving, *, host_free_mib: int, timings: Timings) -> Swap:
    """Return how to change from what serves to the planned model, the cheapest way first."""
    running, asleep = serving.running, serving.asleep
    gib = plan.memory.weights * plan.tensor_parallel / GIB
    load = (timings.load_warm if serving.loaded_before else timings.load_cold) + gib / timings.read_gib_per_second
    wanted = plan.memory.weights + plan.memory.overhead
    if not plan.fits:
        return Swap("none", 0.0, "the new model does not fit even alone, so what runs stays as it is", 0.0)
    gpu, share = plan.gpu, plan_utilization(plan)
    foreign = max(0, gpu.total_mib - gpu.free_mib - (running.used_mib if running else 0))
    # vLLM refuses to start where less is free than its share of the whole.
    if gpu.total_mib - foreign + FOREIGN_TOLERANCE_MIB < share * gpu.total_mib:
        anyway = f" even if {running.name} stops" if running else ""
        return Swap("none", 0.0, f"other programs hold {foreign:,} of {gpu.total_mib:,} MiB, so a share of {share:g} is not free{anyway}.", 0.0)
    if running is None:
        return Swap("start", 0.0, "nothing runs now", 0.0)
    # Green's share is what is free, at most what was asked for.
    beside = min(share, math.floor(100 * (gpu.free_mib - 256) / gpu.total_mib) / 100)
    one_context = plan.memory.request
    if beside > 0 and beside * gpu.total >= wanted + one_context:
        return Swap(
            "side_by_side", 0.0, f"{gpu.free_mib:,} MiB are free beside {running.name}, and the new model needs {(wanted + one_context) // MIB:,}", beside
        )
    blue_gib = running.weights_mib / 1024
    sleep = (timings.later_sleep_per_gib if running.slept_before else timings.first_sleep_per_gib) * blue_gib
    stop_and_load = timings.stop + load
    if not running.sleep_mode:
        why = f"{running.name} was started without sleep mode"
    elif gpu.total_mib - foreign - ASLEEP_MIB < math.ceil(share * gpu.total_mib):
        why = f"beside {running.name} asleep ({ASLEEP_MIB:,} MiB) and other programs ({foreign:,} MiB) the new model's share is not free"
    elif not running.slept_before and host_free_mib < running.weights_mib + 2048:
        why = f"the host has {host_free_mib:,} MiB of memory free, and the weights of {running.name} take {running.weights_mib:,}"
    else:
        then = timings.wake_per_gib * gib if asleep else load
        reason = f"{running.name} sleeps, and {'the new model wakes' if asleep else 'the new model loads'}; going back takes one wake-up"
        return Swap("sleep", round(sleep + then, 1), reason, share)
    return Swap("hold_and_recreate", round(stop_and_load, 1), f"{why}, so it stops before the new one loads", share)


def plan_utilization(plan: Plan) -> float:
    """Return the share of the memory that the plan takes, as asked for."""
    taken = plan.memory.weights + plan.memory.overhead + plan.memory.kv_cache
    return round(taken / plan.gpu.total, 4)
