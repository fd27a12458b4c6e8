# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""What more arguments of `vllm serve` change about a plan, read as vLLM reads them. PRIVATE to the collection: it may change at any time.

Dashes and underscores are the same, a value follows or stands behind "=", the last one counts, `--group.key value` is a part of a JSON object, and
`--no-X`, or `--disable-X` for `--enable-X`, switches off (vllm/utils/argparse_utils.py). Python's argparse takes any beginning that only one name has.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_config import PlanError, plain

# How keys and values can be kept, and the bytes of an element. Others that vLLM has are a matter of single backends.
KV_CACHE_DTYPES = {"auto": 0, "float16": 2, "half": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
DTYPES = {"auto": 2, "half": 2, "float16": 2, "bfloat16": 2, "float": 4, "float32": 4}
STATE_DTYPES = {"auto": 0, "float16": 2, "half": 2, "bfloat16": 2, "float": 4, "float32": 4}
# Other names of the arguments that a plan reads (make_arg_parser in vllm/engine/arg_utils.py).
ALIASES = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-q": "--quantization",
    "-sc": "--speculative-config",
    "-cc": "--compilation-config",
    "-ep": "--enable-expert-parallel",
    "--device-memory-utilization": "--gpu-memory-utilization",
}
# Whether something is on. These take no value.
SWITCHES = (
    "--enforce-eager",
    "--language-model-only",
    "--enable-prefix-caching",
    "--async-scheduling",
    "--enable-lora",
    "--enable-expert-parallel",
    "--allow-deprecated-quantization",
)
# Objects, given as JSON or key by key.
OBJECTS = ("--speculative-config", "--compilation-config", "--hf-overrides", "--limit-mm-per-prompt", "--quantization-config")
SIZES = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
MOST = 10**8
# Ways of guessing ahead that have no model of their own.
WITHOUT_A_DRAFT = ("ngram", "ngram_gpu", "suffix", "custom_class")


@dataclass(frozen=True)
class Draft:
    """Speculative decoding: how many `tokens` are guessed ahead, by which `method`, and by which `model`, empty where it is the model's own head or none."""

    tokens: int = 0
    method: str = ""
    model: str = ""
    revision: str = ""


@dataclass(frozen=True)
class Arguments:
    """What of the arguments a plan depends on. 0, or nothing, means that nothing was said, and a `context` of -1 the longest that fits."""

    kv_cache_dtype: str = ""
    eager: bool = False
    text_only: bool = False
    prefix_caching: bool = True
    one_step: bool = False
    requests: int = 0
    tokens: int = 0
    block: int = 0
    captured: int = 0
    draft: Draft = field(default_factory=Draft)
    quantization: str = ""
    deprecated: bool = False
    element: int = 2
    state_element: int = 0
    context: int = 0
    utilization: float = 0.0
    cache_bytes: int = 0
    offloaded_bytes: int = 0
    tensor_parallel: int = 0
    pipeline_parallel: int = 0
    data_parallel: int = 1
    loras: int = 0
    lora_rank: int = 16
    overrides: Mapping[str, Any] = field(default_factory=dict)


def read_arguments(arguments: Sequence[str], known: Iterable[str] = ()) -> Arguments:
    """Return what more arguments change about a plan. `known` are all that the vLLM that serves has. Raises PlanError."""
    values, objects = split(arguments, frozenset(known))

    def count(name: str, default: int = 0, most: int = MOST) -> int:
        return number(name, values[name], most) if name in values else default

    compilation = objects.get("--compilation-config", {})
    captured = [size for size in compilation.get("cudagraph_capture_sizes") or [] if isinstance(size, int)] if isinstance(compilation, dict) else []
    return Arguments(
        kv_cache_dtype=one_of("--kv-cache-dtype", values, KV_CACHE_DTYPES),
        eager=is_eager(values, compilation),
        text_only=on(values, "--language-model-only") or no_media(objects.get("--limit-mm-per-prompt", {})),
        prefix_caching=on(values, "--enable-prefix-caching", default=True),
        one_step=not on(values, "--async-scheduling", default=True),
        requests=count("--max-num-seqs"),
        tokens=count("--max-num-batched-tokens"),
        block=count("--block-size"),
        captured=max(captured, default=0) or count("--max-cudagraph-capture-size"),
        draft=draft_of(values, objects),
        quantization=values.get("--quantization", "").lower(),
        deprecated=on(values, "--allow-deprecated-quantization"),
        element=DTYPES.get(one_of("--dtype", values, DTYPES), 2),
        state_element=STATE_DTYPES.get(one_of("--mamba-ssm-cache-dtype", values, STATE_DTYPES), 0),
        context=context_of(values),
        utilization=share("--gpu-memory-utilization", values),
        cache_bytes=count("--kv-cache-memory-bytes", most=10**14),
        offloaded_bytes=int(fraction("--cpu-offload-gb", values) * 1024**3),
        tensor_parallel=count("--tensor-parallel-size"),
        pipeline_parallel=count("--pipeline-parallel-size"),
        data_parallel=count("--data-parallel-size", 1),
        loras=count("--max-loras", 1) if on(values, "--enable-lora") else 0,
        lora_rank=count("--max-lora-rank", 16),
        overrides=objects.get("--hf-overrides", {}),
    )


# ------------------------------------------------------------------------------------------------------------- words, as vLLM splits them


def split(arguments: Sequence[str], known: frozenset[str] = frozenset()) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Return the value of each argument, the last one that was given, and the objects that are given as JSON or in parts. Raises PlanError.

    A switch is "on" or "off".
    """
    values: dict[str, str] = {}
    parts: dict[str, dict[str, Any]] = {}
    words = [str(word) for word in arguments]
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not is_name(word):
            continue
        word, equals, value = optimization(word).partition("=")
        head, dot, path = word.partition(".")
        name = full_name(head, known)
        switch, state = switched(name)
        if switch in SWITCHES:
            if equals:
                raise PlanError(f"{word} has the value {plain(value)}; it takes none, and {opposite(switch)} switches it off.")
            values[switch] = state
            continue
        if not equals and index < len(words) and not is_name(words[index]):
            value = words[index]
            index += 1
        if dot:
            put(parts.setdefault(name, {}), path, value)
        elif name in OBJECTS:
            parts[name] = object_of(name, value)
        else:
            values[name] = value
    return values, parts


def is_name(word: str) -> bool:
    """Whether a word is an argument's name and not a value; a negative number is a value."""
    return word.startswith("-") and word != "-" and not re.fullmatch(r"-\d+(\.\d+)?", word)


def optimization(word: str) -> str:
    """Return -O2 and -O=2 as --optimization-level=2."""
    match = re.fullmatch(r"-O=?(\w+)", word)
    return f"--optimization-level={match.group(1)}" if match else "--optimization-level" if word == "-O" else word


def full_name(head: str, known: frozenset[str]) -> str:
    """Return an argument's own name: with dashes, no alias, no beginning. Raises PlanError for one that vLLM does not have."""
    name = head.replace("_", "-") if head.startswith("--") else head
    if name in ALIASES:
        return ALIASES[name]
    if not known or name in known:
        return name
    every = known | {other for entry in known if entry.startswith("--") for other in (opposite(entry), f"--no-{entry[2:]}", f"--no-{opposite(entry)[2:]}")}
    if name in every:
        return name
    begun = [entry for entry in sorted(known) if name.startswith("--") and entry.startswith(name)]
    if len(begun) == 1:
        return ALIASES.get(begun[0], begun[0])
    close = begun[:3] or difflib.get_close_matches(name, sorted(every), 3)
    hint = f"; it has {', '.join(close)}" if close else ""
    raise PlanError(f"vllm_extra_arguments has {plain(head)}, which the pinned vLLM {'does not know' if not begun else 'cannot tell from others'}{hint}.")


def opposite(name: str) -> str:
    """Return what switches an argument off."""
    for prefix, inverse in (("--enable-", "--disable-"), ("--disable-", "--enable-")):
        if name.startswith(prefix):
            return inverse + name.removeprefix(prefix)
    return f"--no-{name[2:]}"


def switched(name: str) -> tuple[str, str]:
    """Return what a name switches, and "on" or "off"."""
    for switch in SWITCHES:
        if name == switch:
            return switch, "on"
        if name in (opposite(switch), f"--no-{switch[2:]}"):
            return switch, "off"
        if name == f"--no-{opposite(switch)[2:]}":
            return switch, "on"
    return name, ""


def on(values: Mapping[str, str], name: str, *, default: bool = False) -> bool:
    return values[name] == "on" if name in values else default


def put(into: dict[str, Any], path: str, value: str) -> None:
    """Put the value of `--group.a.b value` into an object; a key that ends in "+" is a list."""
    listed = path.endswith("+")
    *parents, last = path.removesuffix("+").split(".")
    for key in parents:
        inner = into.setdefault(key, {})
        if not isinstance(inner, dict):
            inner = into[key] = {}
        into = inner
    if listed:
        before = into.get(last)
        into[last] = (before if isinstance(before, list) else []) + [json_or_text(word) for word in value.split(",")]
    else:
        into[last] = json_or_text(value)


def json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def object_of(name: str, value: str) -> dict[str, Any]:
    found = json_or_text(value)
    if not isinstance(found, dict):
        raise PlanError(f"{name} is {plain(value)}; allowed is a JSON object.")
    return found


# -------------------------------------------------------------------------------------------------------------------------- values


def one_of(name: str, values: Mapping[str, str], allowed: Mapping[str, int]) -> str:
    value = values.get(name, "")
    if value and value not in allowed:
        raise PlanError(f"{name} is {plain(value)}, which this plan cannot size; it can {', '.join(allowed)}.")
    return value


def number(name: str, value: str, most: int = MOST) -> int:
    """Return a number as vLLM's command line takes it: 8192, 8k or 1.5K. Raises PlanError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", value)
    found = int(float(match.group(1)) * SIZES[match.group(2)]) if match and len(value) < 20 else 0
    if not 1 <= found <= most:
        raise PlanError(f"{name} is {plain(value)}; allowed is a whole number from 1 to {most:,}.")
    return found


def fraction(name: str, values: Mapping[str, str], most: float = 10**5) -> float:
    if name not in values:
        return 0.0
    try:
        found = float(values[name])
    except ValueError:
        found = -1.0
    if not 0 <= found <= most:
        raise PlanError(f"{name} is {plain(values[name])}; allowed is a number from 0 to {most:,.0f}.")
    return found


def share(name: str, values: Mapping[str, str]) -> float:
    if name not in values:
        return 0.0
    found = fraction(name, values, 1)
    if not found:
        raise PlanError(f"{name} is {plain(values[name])}; allowed is more than 0 and at most 1.")
    return found


def context_of(values: Mapping[str, str]) -> int:
    value = values.get("--max-model-len", "")
    if value.lower() in ("auto", "-1"):
        return -1
    return number("--max-model-len", value) if "--max-model-len" in values else 0


def is_eager(values: Mapping[str, str], compilation: Mapping[str, Any]) -> bool:
    """Whether no CUDA graphs are captured and nothing is compiled. Compiling alone is counted as both."""
    if "--enforce-eager" in values:
        return on(values, "--enforce-eager")
    if values.get("--optimization-level") == "0":
        return True
    graphs, mode = str(compilation.get("cudagraph_mode", "")).lower(), str(compilation.get("mode", "")).lower()
    return graphs in ("none", "0") and mode in ("none", "0")


def no_media(limits: Mapping[str, Any]) -> bool:
    """Whether a model that could take images or sound is told to take none."""
    return bool(limits) and all(limit == 0 and not isinstance(limit, bool) for limit in limits.values())


def draft_of(values: Mapping[str, str], objects: Mapping[str, Mapping[str, Any]]) -> Draft:
    """Return how speculative decoding guesses ahead. Raises PlanError."""
    found = {str(key).replace("-", "_"): value for key, value in objects.get("--speculative-config", {}).items()}
    for name, key in (("--spec-method", "method"), ("--spec-model", "model"), ("--spec-tokens", "num_speculative_tokens")):
        if name in values:
            if key in found:
                raise PlanError(f"{name} says what --speculative-config says too, its {key}; allowed is one of both.")
            found[key] = values[name]
    if not found:
        return Draft()
    texts = {key: found.get(key) or "" for key in ("method", "model", "revision")}
    wrong = next((key for key, value in texts.items() if not isinstance(value, str)), None)
    if wrong:
        raise PlanError(f"--speculative-config has {plain(texts[wrong])} as {wrong}; allowed is a word.")
    if not texts["method"] and not texts["model"]:
        raise PlanError("--speculative-config has neither a method nor a model; allowed is at least one of them.")
    tokens = found.get("num_speculative_tokens")
    return Draft(number("--speculative-config's num_speculative_tokens", str(tokens), 1000) if tokens is not None else 1, **texts)
