# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""Which family a model belongs to, and what it is for: its parsers, its template, or that it does not chat. PRIVATE to the collection: it may change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_config import PlanError

# What a family says where the catalogue says nothing.
NOTHING = {"names": [], "tool_call_parser": "", "reasoning_parser": "", "chat_template": "", "tokenizer_mode": "", "kind": "", "since": "", "notes": ""}
# What is appended to a model's name where it is kept in another format; no model is told from another by it.
FORMATS = (
    r"-(fp8|fp4|fp16|bf16|nvfp4|mxfp4|mxfp8|int4|int8|awq|gptq|bnb|4bit|8bit|4-bit|8-bit|w4a16|w8a8|w8a16|w4a4|w4afp8|g\d+|gs\d+|dynamic|static|block|asym|sym"
    r"|autoround|auto-round|marlin|quantized|quantized\.w\d+a\d+|hf|unsloth|torchao|per-tensor|mixed|ct|mlx|safetensors|preview)"
)
# Architectures of models that answer with numbers. vLLM makes one of any model's architecture that ends so (vllm/config/model.py, SUFFIX_DEFAULTS).
POOLING = (
    (r".*ForSequenceClassification|.*ForTokenClassification|.*ForJointSchema", "a classifier, which answers with classes"),
    (r".*RewardModel", "a reward model, which answers with a mark"),
    (r".*ForRanking|.*ForRetrieval", "a reranker, which answers with marks"),
    (r".*(EmbeddingModel|EmbedModel|Model|ForMaskedLM)|Col.*|HF_ColBERT|Terratorch", "an embedding model, which answers with vectors"),
)


def plain_name(name: str) -> str:
    """Return a model's name as families are told by it: in lower case, without its owner, its revision and the format of its weights.

    A directory that the role named is OWNER--NAME--REVISION.
    """
    own = name.rstrip("/").rpartition("/")[2]
    parts = [part for part in own.split("--") if part]
    if len(parts) > 1:
        own = parts[1]
    plain = re.sub(r"[^a-z0-9.]+", "-", own.lower()).strip("-")
    before = ""
    while before != plain:
        before = plain
        plain = re.sub(FORMATS + "$", "", plain)
    return plain


def match_family(families: Sequence[dict[str, Any]], name: str, architecture: str) -> dict[str, Any] | None:
    """Return the first family of the architecture that has the name, or takes any; None if no family does."""
    plain = plain_name(name)
    for entry in families:
        family = NOTHING | entry
        if architecture in family["architectures"] and (not family["names"] or any(re.fullmatch(pattern, plain) for pattern in family["names"])):
            return family
    return None


def check_answers_with_text(architecture: str, served: set[str]) -> None:
    """Raise PlanError for an architecture whose models do not write: `served` are those that vLLM generates text with."""
    if architecture in served:
        return
    for pattern, what in POOLING:
        if re.fullmatch(pattern, architecture):
            raise PlanError(f"{architecture} is {what} and not with text; the agent needs a model that chats.")


def check_parser(kind: str, name: str, known: Sequence[str]) -> None:
    """Raise PlanError for a parser that the pinned vLLM does not have."""
    if name and known and name not in known:
        close = [entry for entry in known if name[:4] == entry[:4]]
        hint = f", for example {', '.join(close[:3])}" if close else ""
        raise PlanError(f"the pinned vLLM has no {kind} parser {name}{hint}.")
