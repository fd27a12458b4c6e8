# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""A model's config.json, read with care: every number is checked where it is read. PRIVATE to the collection: it may change at any time.

A config.json may come from anyone. Whatever it holds gives a value or a PlanError with one sentence, never another exception.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GIB = 1024**3
MIB = 1024**2
# More than any model has by a factor of ten, and little enough to count with.
MOST_LAYERS = 5_000
MOST = 10**9
# Where a model of several parts describes the one that writes text. vLLM looks there, too (get_hf_text_config).
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
# What transformers' configuration classes assume where a published config.json says nothing; `gemma3_text` and the text parts of LLaVA do so.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 26,
        "head_dim": 256,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "sliding_window": 4096,
    },
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
    },
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
    "mamba2": {"expand": 2, "n_groups": 8, "conv_kernel": 4, "state_size": 128, "head_dim": 64, "num_heads": 128},
    "mamba": {"expand": 2, "conv_kernel": 4, "state_size": 16},
    "falcon_mamba": {"expand": 2, "conv_kernel": 4, "state_size": 16},
}
# How the lengths of a context are called; vLLM takes the smallest, and `model_max_length` before any other.
LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# Kinds of rotary scaling after which the configured length is already the longest (vllm/config/model.py, _get_and_verify_max_len).
SCALED_ALREADY = ("default", "su", "longrope", "llama3", "mrope", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


class PlanError(ValueError):
    """An input that no plan can be made from; the message is one sentence for the user."""


class UnknownArchitecture(PlanError):
    """An architecture that vLLM serves and the formulas do not know."""


def plain(value: Any) -> str:
    """Return a value as a sentence may show it: short, and on one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def overridden(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with the values of `--hf-overrides` in place of its own, part by part."""
    found = dict(config)
    for name, value in changes.items():
        before = found.get(name)
        found[name] = overridden(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return found


class Config:
    """The part of a config.json that describes the model's text layers. Reading a value of a wrong type or size raises PlanError."""

    def __init__(self, values: Mapping[str, Any], architecture: str, *, multimodal: bool = False, inner: bool = False) -> None:
        """`inner`: the values come from a part of a larger configuration, which leaves out what is as its class assumes."""
        self.values = values
        self.architecture = architecture
        self.multimodal = multimodal
        model_type = self.model_type
        self.defaults = DEFAULTS.get(model_type, {}) if inner or model_type not in ("llama", "mistral", "qwen2", "qwen3") else {}

    @property
    def model_type(self) -> str:
        return str(self.values.get("model_type") or "")

    def get(self, name: str) -> Any:
        value = self.values.get(name)
        return self.defaults.get(name) if value is None else value

    def wrong(self, name: str, value: Any, allowed: str) -> PlanError:
        return PlanError(
            f"config.json of {self.architecture} lacks a number that memory depends on, or has it in a form not known: "
            f"{name} is {'missing' if value is None else plain(value)}; allowed is {allowed}."
        )

    def number(self, *names: str, default: int | None = None, least: int = 0, most: int = MOST) -> int:
        """Return the first of some whole numbers that is there, or the default. Raises PlanError."""
        name = next((name for name in names if self.get(name) is not None), None)
        if name is None:
            if default is None:
                raise self.wrong(names[0], None, f"a whole number from {least:,} to {most:,}")
            return default
        return self.checked(name, self.get(name), least, most)

    def checked(self, name: str, value: Any, least: int = 0, most: int = MOST) -> int:
        """Return a value that must be a whole number. Raises PlanError."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most or value != int(value):
            raise self.wrong(name, value, f"a whole number from {least:,} to {most:,}")
        return int(value)

    def flag(self, name: str) -> bool:
        return bool(self.get(name))

    def part(self, name: str) -> dict[str, Any]:
        """Return an object inside the configuration, empty if there is none. Raises PlanError."""
        value = self.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return value

    def list_of(self, name: str, kind: type | tuple[type, ...]) -> list[Any] | None:
        """Return a list whose entries have a type, None if there is none. Raises PlanError."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(entry, kind) for entry in value):
            raise self.wrong(name, value, "a list")
        return list(value)

    def per_layer(self, name: str, kind: type | tuple[type, ...], layers: int) -> list[Any] | None:
        """Return a list with an entry for each layer; more of them describe layers for speculative decoding. Raises PlanError."""
        found = self.list_of(name, kind)
        if found is not None and len(found) < layers:
            raise PlanError(f"config.json of {self.architecture} has {len(found)} {name} for {layers} layers; allowed is one for each layer.")
        return None if found is None else found[:layers]

    def some(self, name: str, value: Any, least: int = 0, most: int = MOST_LAYERS) -> list[int]:
        """Return a list of whole numbers, such as those of layers. Raises PlanError."""
        if not isinstance(value, list):
            raise self.wrong(name, value, "a list of whole numbers")
        return [self.checked(name, entry, least, most) for entry in value]


def read_config(config: Any) -> Config:
    """Return the text part of a config.json. Raises PlanError."""
    if not isinstance(config, dict):
        raise PlanError("config.json does not hold an object.")
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(first, str) or not first:
        raise PlanError("config.json names no architecture, so vLLM cannot know what model this is.")
    merged, inner = dict(config), False
    for _depth in range(2):  # Qwen3-Omni's text is two parts deep
        text = next((merged[name] for name in TEXT_PARTS if isinstance(merged.get(name), dict)), None)
        if text is None:
            break
        outer = {key: value for key, value in merged.items() if key not in TEXT_PARTS}
        merged, inner = {**outer, **text}, True
    # A quantisation is described for the whole model even where its text part has a config of its own.
    described = config.get("quantization_config") or merged.get("quantization_config") or config.get("compression_config")
    merged["quantization_config"] = described
    seen = any(isinstance(config.get(key), dict) for key in ("vision_config", "audio_config", "vision_tower_config"))
    return Config(merged, first, multimodal=seen, inner=inner)


def max_context(config: Config) -> int:
    """Return the longest context that vLLM lets the model have, in tokens (vllm/config/model.py, _get_and_verify_max_len). Raises PlanError."""
    found = [config.number(name, least=1) for name in LENGTHS if config.get(name) is not None]
    length = min(found, default=2048)
    if config.get("model_max_length") is not None and (not found or config.model_type in ("cohere", "cohere2", "kimi_linear")):
        length = config.number("model_max_length", least=1)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise config.wrong("rope_scaling", scaling, "an object")
    # Models with two geometries scale each kind of layer by itself; none of theirs is scaled.
    kind = scaling.get("rope_type") or scaling.get("type")
    if not isinstance(kind, str) or kind in SCALED_ALREADY or "gemma3" in config.model_type:
        return length
    factor = scaling.get("factor")
    if factor is None:
        return length
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1000:
        raise config.wrong("rope_scaling.factor", factor, "a number above 0 and at most 1,000")
    return int(length * factor)
