# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""Ask vLLM itself what a model caches, inside its image, for architectures without a formula. PRIVATE to the collection: it may change at any time.

The program inside is roles/vllm/files/ask_vllm.py. It gets the model's configuration and tokenizer, no weights, no GPU, no network and no right to write.
What it says is kept by image, program and files, so that a model is asked for once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import subprocess
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_config import GIB, MOST, PlanError, plain
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_specs import (
    CHUNKED,
    FULL,
    GATED_DELTA,
    INDEXER,
    LATENT,
    SLIDING,
    SLIDING_LATENT,
    STATE,
    Layer,
)
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_weights import Parameters

MARK = "ANSWER "
# Importing vLLM takes half a minute of one core, and constructing a model some seconds; a host whose disk is slow or cold takes several times that.
PATIENCE_SECONDS = 600
# vLLM's word for each kind of layer. What is not here, such as the cache of an encoder, is not planned.
KINDS = {
    "FullAttention": FULL,
    "RSWA": FULL,
    "SinkFullAttention": FULL,
    "SlidingWindow": SLIDING,
    "ChunkedLocalAttention": CHUNKED,
    "MLAAttention": LATENT,
    "SlidingWindowMLA": SLIDING_LATENT,
    "Mamba": STATE,
}
SIZES = ("layers", "hidden", "heads", "kv_heads", "intermediate", "experts", "active_experts", "expert_intermediate", "vocabulary")


class ImageAbsent(PlanError):
    """vLLM's image is not on the host yet, so vLLM cannot be asked."""


class Unshared(PlanError):
    """A number of GPUs that vLLM does not share a model among."""


@dataclass(frozen=True)
class Answer:
    """What vLLM said. `layers` are those of one GPU for each number of GPUs, with `element` bytes of keys and values; `refused` are its errors."""

    sizes: Mapping[str, int]
    parameters: Parameters
    max_context: int
    layers: Mapping[int, tuple[tuple[Layer, int], ...]]
    refused: Mapping[int, str]

    def caches(self, gpus: int, element: int) -> tuple[Layer, ...]:
        """Return what the layers keep on each of some GPUs. Raises Unshared where vLLM refused, or was not asked."""
        if gpus not in self.layers:
            said = self.refused.get(gpus, "it was not asked")
            raise Unshared(f"vLLM does not share the model among {gpus} GPUs: {said.rstrip('.')}.")
        return tuple(rescaled(layer, own, element) for layer, own in self.layers[gpus])


def rescaled(layer: Layer, own: int, element: int) -> Layer:
    """Return a layer whose keys and values take `element` bytes each. States, and what is packed already, stay as they are."""
    if layer.kind == STATE or own <= element:
        return layer
    return Layer(layer.kind, layer.count, layer.bytes * element // own, layer.window, layer.tokens_per_entry, layer.block, layer.alignment, layer.role)


# -------------------------------------------------------------------------------------------------------------------- what it says


def read_answer(text: str) -> Answer:
    """Return what the program said. Raises PlanError with vLLM's own reason if it built the model for no number of GPUs."""
    line = next((line for line in reversed(text.splitlines()) if line.startswith(MARK)), "")
    try:
        said = json.loads(line.removeprefix(MARK))["gpus"]
        refused = {int(gpus): str(entry["error"]) for gpus, entry in said.items() if "error" in entry}
        built = {int(gpus): entry for gpus, entry in said.items() if "error" not in entry}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PlanError(f"vLLM's image did not say what the model caches; its last words were {plain(last_words(text))}.") from None
    if 1 not in built:
        raise PlanError(f"vLLM itself does not build the model: {refused.get(1, 'it gave no reason').rstrip('.')}.")
    try:
        layers = {gpus: tuple(layer_of(entry) for entry in answer["layers"]) for gpus, answer in built.items()}
        whole = built[1]
        sizes = {name: checked(whole["sizes"][name]) for name in SIZES}
        counted = {name: checked(whole["parameters"][name], 10**15) for name in ("embedding", "linear", "experts", "other")}
        context = checked(whole["context"] or 0)
    except PlanError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise PlanError(f"vLLM's image described the model in a form not known: {plain(str(error))}.") from None
    experts = counted["experts"]
    return Answer(sizes, Parameters(counted["embedding"], counted["linear"] + experts, counted["other"], experts), context, layers, refused)


def layer_of(entry: Mapping[str, Any]) -> tuple[Layer, int]:
    """Return layers of one specification, and the bytes of one element. Raises PlanError for a kind that is not planned."""
    kind = KINDS.get(str(entry["kind"]))
    count = checked(entry["count"])
    if kind is None:
        raise PlanError(f"the model has layers of the kind {plain(entry['kind'])}, whose cache is not planned.")
    if kind == STATE:
        return Layer(STATE, count, checked(entry["state_bytes"]), role=GATED_DELTA if str(entry.get("type", "")).startswith("gdn") else ""), 1
    block, element = checked(entry["block"]), checked(entry["element"])
    together = float(entry.get("tokens_per_entry", 1))
    token = math.ceil(checked(entry["bytes"]) * together / block)
    window = checked(entry.get("sliding_window") or entry.get("attention_chunk_size") or 0) if kind in (SLIDING, SLIDING_LATENT, CHUNKED) else 0
    # Only what the model fixes: where it says nothing, blocks are those of CUDA's backends, and these are a CPU's.
    alignment = checked(entry.get("alignment") or 1)
    fixed = block if alignment > 1 else 0
    role = INDEXER if kind == LATENT and element == 1 and not fixed else ""
    return Layer(kind, count, token, window, max(1, int(together)), fixed, alignment, role), element


def checked(value: Any, most: int = MOST * 1000) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{value!r} is no number of the kind")
    return value


def last_words(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "none")[:200]


# ------------------------------------------------------------------------------------------------------------------------- asking


def counts(gpus: int, wanted: int = 0) -> list[int]:
    """Return the numbers of GPUs to ask for: powers of two up to those that there are, always one, and the number that is wanted."""
    powers = {2**power for power in range(max(1, gpus).bit_length()) if 2**power <= max(1, gpus)}
    return sorted(powers | {max(1, wanted)})


def command(image: str, name: str, files: Path, gpus: Sequence[int]) -> list[str]:
    """Return how the program is run. It reads it from its standard input."""
    confined = ["--network", "none", "--read-only", "--tmpfs", "/tmp:exec,size=4g", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"]  # noqa: S108
    confined += ["--pids-limit", "1024", "--memory", str(16 * GIB), "--user", "10001:10001"]
    # Not the GPUs, which another model may be using. The user has no name in the image, for which torch asks.
    environment = ["--env", "HOME=/tmp", "--env", "USER=vllm", "--env", "LOGNAME=vllm", "--env", "NVIDIA_VISIBLE_DEVICES=void"]
    mounted = ["--volume", f"{files}:/model:ro", "--entrypoint", "python3", image, "-", "/model", *map(str, gpus)]
    return ["run", "--rm", "--interactive", "--name", name, *confined, *environment, *mounted]


def run(docker: str, arguments: Sequence[str], entered: str, seconds: float) -> subprocess.CompletedProcess[str]:
    # run_command has no limit of time, and a model may take for ever.
    # pylint: disable-next=ansible-bad-function
    return subprocess.run([docker, *arguments], input=entered, capture_output=True, text=True, errors="replace", check=False, timeout=seconds)


def image_id(docker: str, image: str) -> str:
    """Return what identifies an image's content. Raises ImageAbsent, and PlanError if the engine does not answer."""
    try:
        said = run(docker, ["image", "inspect", "--format", "{{.Id}}", image], "", 60)
    except (OSError, subprocess.SubprocessError) as error:
        raise PlanError(f"{docker} cannot be asked for the image {image}: {plain(str(error))}.") from None
    if said.returncode:
        if "no such image" in said.stderr.lower():
            raise ImageAbsent(f"the image {image} is not on this host yet.")
        raise PlanError(f"{docker} cannot be asked for the image {image}: {plain(last_words(said.stderr))}.")
    return said.stdout.strip()


def ask(docker: str | None, image: str, program: str, files: Mapping[str, bytes], gpus: Sequence[int], kept: Path | None) -> Answer:
    """Return what the vLLM of an image says of a model. Raises ImageAbsent, and PlanError.

    files: the model's config.json and what else is small, by name
    kept: directory for answers, which are asked for once; None keeps none
    """
    if docker is None:
        raise ImageAbsent("there is no Docker on this host yet.")
    identity = image_id(docker, image)
    place = kept / f"{key(identity, program, files, gpus)}.json" if kept else None
    if place:
        with contextlib.suppress(OSError, PlanError):
            return read_answer(place.read_text())
    text = ask_now(docker, image, program, files, gpus)
    answer = read_answer(text)
    if place:
        keep(place, next(line for line in reversed(text.splitlines()) if line.startswith(MARK)))
    return answer


def key(identity: str, program: str, files: Mapping[str, bytes], gpus: Sequence[int]) -> str:
    """Return a name for an answer: another image, program, file or number of GPUs has another one."""
    digest = hashlib.sha256(json.dumps([identity, program, list(gpus), sorted(files)]).encode())
    for name in sorted(files):
        digest.update(hashlib.sha256(files[name]).digest())
    return digest.hexdigest()[:32]


def ask_now(docker: str, image: str, program: str, files: Mapping[str, bytes], gpus: Sequence[int]) -> str:
    """Return what the program prints. Raises PlanError."""
    name = f"agent-stack-ask-{uuid.uuid4().hex[:12]}"
    with tempfile.TemporaryDirectory(prefix="agent-stack-ask-") as directory:
        # The user inside is nobody here.
        os.chmod(directory, 0o755)  # noqa: S103
        for file, content in files.items():
            (Path(directory) / file).write_bytes(content)
            os.chmod(Path(directory) / file, 0o644)
        try:
            said = run(docker, command(image, name, Path(directory), gpus), program, PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            # The client is gone, and the container is not.
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                run(docker, ["rm", "--force", name], "", 60)
            raise PlanError(f"vLLM did not say within {PATIENCE_SECONDS} s what the model caches.") from None
        except OSError as error:
            raise PlanError(f"{docker} cannot be run: {error.strerror}.") from None
    if said.returncode:
        raise PlanError(f"vLLM's image ended with {said.returncode} when it was asked what the model caches: {plain(last_words(said.stderr or said.stdout))}.")
    return said.stdout


def keep(place: Path, text: str) -> None:
    """Write an answer such that another run never reads half of it. A full disk is no reason not to plan."""
    with contextlib.suppress(OSError):
        place.parent.mkdir(mode=0o750, exist_ok=True)
        new = place.with_name(f".{place.name}.{os.getpid()}")
        new.write_text(text)
        new.replace(place)
