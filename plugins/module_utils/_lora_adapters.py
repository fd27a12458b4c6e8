# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""LoRA adapters beside a served model: what vLLM takes, and the rank that it must be told. PRIVATE to the collection: it may change at any time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_catalogue import plain_name
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_config import PlanError, plain

# What --max-lora-rank may be (vllm/config/lora.py, MaxLoRARanks).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# One of these holds the weights (vllm/lora/lora_model.py).
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Adapter:
    """An adapter of the inventory: the name that requests ask for it by, and where it is, an id on the hub or a directory of the host."""

    name: str
    source: str
    revision: str = ""


def read_adapters(entries: Any) -> list[Adapter]:
    """Return the adapters that a list of the inventory names. Raises PlanError."""
    allowed = "allowed is a list of objects with name, source and, if it is not the main branch, revision"
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise PlanError(f"vllm_lora_adapters is {plain(entries)}; {allowed}.")
    found: list[Adapter] = []
    for entry in entries:
        known = isinstance(entry, Mapping) and {"name", "source"} <= set(entry) <= {"name", "source", "revision"}
        if not known or not all(isinstance(value, str) for value in entry.values()) or not entry["source"]:
            raise PlanError(f"vllm_lora_adapters has {plain(entry)}; {allowed}.")
        adapter = Adapter(entry["name"], entry["source"], entry.get("revision", ""))
        if not NAME.fullmatch(adapter.name):
            raise PlanError(f"vllm_lora_adapters has the name {plain(adapter.name)}; allowed are up to 64 letters, digits, '.', '_' and '-'.")
        if adapter.name in [other.name for other in found]:
            raise PlanError(f"vllm_lora_adapters has the name {plain(adapter.name)} twice; allowed is a name of its own for each.")
        found.append(adapter)
    return found


def rank_of(adapter: Adapter, described: Mapping[str, Any], files: Sequence[str]) -> int:
    """Return the rank of an adapter, from its adapter_config.json. Raises PlanError for one that vLLM does not take (vllm/lora/peft_helper.py)."""

    def refused(why: str) -> PlanError:
        return PlanError(f"the adapter {adapter.name} ({adapter.source}) {why}")

    kind = described.get("peft_type")
    if kind != "LORA":
        raise refused(f"is of the type {plain(kind)}; vLLM serves LoRA.")
    if described.get("use_dora"):
        raise refused("uses DoRA, which vLLM does not serve.")
    if described.get("lora_bias") or described.get("bias") not in (None, "none"):
        raise refused("has biases, which vLLM does not serve.")
    if described.get("modules_to_save"):
        raise refused("replaces whole modules (modules_to_save), which vLLM does not serve.")
    if not any(name in files for name in WEIGHTS):
        raise refused(f"has no weights; one of {', '.join(WEIGHTS)} is needed.")
    pattern = described.get("rank_pattern") or {}
    ranks = [described.get("r"), *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= RANKS[-1]:
            raise refused(f"has the rank {plain(rank)}; allowed is 1 to {RANKS[-1]}.")
    return max(ranks)


def arguments_of(ranks: Sequence[int]) -> list[str]:
    """Return the arguments of `vllm serve` for adapters of some ranks, all of which may be used in the same step."""
    if not ranks:
        return []
    least = next(rank for rank in RANKS if rank >= max(ranks))
    return ["--enable-lora", "--max-loras", str(len(ranks)), "--max-lora-rank", str(least)]


def strange_base(adapter: Adapter, described: Mapping[str, Any], model: str) -> str:
    """Return a sentence if an adapter says that it was made for another model, or nothing."""
    base = described.get("base_model_name_or_path")
    if not isinstance(base, str) or not base or base.startswith(("/", ".")) or plain_name(base) == plain_name(model):
        return ""
    return f"The adapter {adapter.name} was made for {base}, and the model is {model}; vLLM does not load it if their layers differ."
