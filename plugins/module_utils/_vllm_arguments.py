# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""What more arguments of `vllm serve` change about a plan, read as vLLM reads them. PRIVATE to the collection: it may change at any time.

Dashes and underscores are the same, a value follows or stands behind "=", the last one counts, and `--group.key value` is a part of a JSON object
(vllm/utils/argparse_utils.py, FlexibleArgumentParser).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_config import PlanError, plain

# How keys and values can be kept, and the bytes of an element. Others that vLLM has are a matter of single backends.
KV_CACHE_DTYPES = {"auto": 0, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
# Whether something that a flag names is on; without a value it is.
SWITCHES = ("enforce-eager", "language-model-only", "enable-prefix-caching")
COUNTS = ("max-num-seqs", "max-num-batched-tokens", "block-size")
SIZES = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "K": 1024, "M": 1024**2, "G": 1024**3}
MOST = 10**8


@dataclass(frozen=True)
class Arguments:
    """What of the arguments a plan depends on. 0 means that nothing was said. `drafts` are the tokens that speculative decoding guesses ahead."""

    kv_cache_dtype: str = ""
    eager: bool = False
    text_only: bool = False
    prefix_caching: bool = True
    requests: int = 0
    tokens: int = 0
    block: int = 0
    drafts: int = 0
    quantization: str = ""


def read_arguments(arguments: Sequence[str]) -> Arguments:
    """Return what more arguments change about a plan. Raises PlanError."""
    found = values_of(arguments)
    counts = {name: count(name, found[name]) for name in COUNTS if name in found}
    dtype = str(found.get("kv-cache-dtype") or "")
    if dtype and dtype not in KV_CACHE_DTYPES:
        raise PlanError(f"--kv-cache-dtype is {plain(dtype)}, which this plan cannot size; it can {', '.join(KV_CACHE_DTYPES)}.")
    return Arguments(
        kv_cache_dtype=dtype,
        eager=on(found, "enforce-eager"),
        text_only=on(found, "language-model-only"),
        prefix_caching=on(found, "enable-prefix-caching", default=True),
        requests=counts.get("max-num-seqs", 0),
        tokens=counts.get("max-num-batched-tokens", 0),
        block=counts.get("block-size", 0),
        drafts=drafts_of(found),
        quantization=str(found.get("quantization") or found.get("q") or ""),
    )


def values_of(arguments: Sequence[str]) -> dict[str, str]:
    """Return the value of each flag, the last one that was given, and nothing for one without a value."""
    found: dict[str, str] = {}
    words = [str(word) for word in arguments]
    for index, word in enumerate(words):
        if not word.startswith("-") or re.fullmatch(r"-\d+(\.\d+)?", word):
            continue
        name, equals, value = word.partition("=")
        flag, dot, key = name.lstrip("-").partition(".")
        flag = flag.replace("_", "-")
        if not equals and index + 1 < len(words) and not words[index + 1].startswith("--"):
            value = words[index + 1]
        found[f"{flag}{dot}{key}"] = value
    return found


def on(found: dict[str, str], name: str, *, default: bool = False) -> bool:
    """Return whether a switch is on. The later of it and its opposite counts."""
    state = default
    for flag in found:
        if flag == name:
            state = found[flag].lower() not in ("false", "0")
        elif flag == f"no-{name}":
            state = False
    return state


def count(name: str, value: str) -> int:
    """Return a number as vLLM's command line takes it: 8192, 8k or 1.5K. Raises PlanError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", value)
    number = int(float(match.group(1)) * SIZES[match.group(2)]) if match and len(value) < 20 else 0
    if not 1 <= number <= MOST:
        raise PlanError(f"--{name} is {plain(value)}; allowed is a whole number from 1 to {MOST:,}.")
    return number


def drafts_of(found: dict[str, str]) -> int:
    """Return how many tokens speculative decoding guesses ahead. Raises PlanError."""
    value: Any = found.get("speculative-config.num-speculative-tokens") or found.get("speculative-config.num_speculative_tokens")
    whole = found.get("speculative-config")
    if whole:
        try:
            described = json.loads(whole)
        except ValueError:
            raise PlanError(f"--speculative-config is {plain(whole)}; allowed is a JSON object.") from None
        if not isinstance(described, dict):
            raise PlanError(f"--speculative-config is {plain(whole)}; allowed is a JSON object.")
        value = described.get("num_speculative_tokens")
    if value is None:
        return 1 if whole or any(flag.startswith("speculative-config.") for flag in found) else 0
    return count("speculative-config's num_speculative_tokens", str(value))
