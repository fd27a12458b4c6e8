# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""Where a model's files are, and how large: a directory, a hub cache, or the hub itself. PRIVATE to the collection: it may change at any time.

Only config.json, the index and the headers of safetensors files are read, never weights.
"""

from __future__ import annotations

import fnmatch
import json
import re
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote

from ansible.module_utils.urls import open_url

INDEX = "model.safetensors.index.json"
# The copies of the weights in other formats, which are not fetched where there are safetensors (files/images/vllm-cpu/fetch_model.py).
OTHER_WEIGHTS = ("*.bin", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pt", "*.pth", "original/*", "consolidated*")
HEADER_LIMIT = 100_000_000
ANSWER_LIMIT = 64_000_000
# An answer may take as many times the timeout, which is for its first byte and for each pause.
SLOWEST = 4


class ModelError(ValueError):
    """A model that cannot be read; the message is one sentence for the user."""


@dataclass(frozen=True)
class ModelFiles:
    """`weight_bytes` is what the weights take when vLLM has loaded them, None if only the config can tell. `missing_bytes` are still to be fetched.

    `chat_template` is whether the model has one, None if nobody can tell. `small` are the files that describe it and its tokenizer.
    `ahead_bytes` are those of tensors that vLLM loads for speculative decoding alone, which `weight_bytes` leave out.
    """

    config: dict[str, Any]
    weight_bytes: int | None
    missing_bytes: int
    origin: str
    revision: str
    chat_template: bool | None = None
    small: tuple[str, ...] = ()
    ahead_bytes: int = 0


# Which layer of the text part a tensor belongs to, and heads that guess several tokens ahead, which vLLM loads for speculative decoding alone.
LAYER = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.")
AHEAD = re.compile(r"(?:model\.)?(?:language_model\.)?mtp\.")
SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.safetensors")
# Files that describe a model and its tokenizer, and the most bytes of one.
SMALL = ("*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja")
SMALL_LIMIT = 32_000_000
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tekken.json")


def unused(name: str, config: Mapping[str, Any]) -> bool:
    """Whether vLLM leaves a tensor out: layers beyond the model's, and heads that guess ahead."""
    if AHEAD.match(name):
        return True
    text = config.get("text_config")
    layers = config.get("num_hidden_layers") or (text.get("num_hidden_layers") if isinstance(text, dict) else None)
    number = LAYER.match(name)
    return bool(number) and isinstance(layers, int) and int(number.group(1) if number else 0) >= layers


def own_weights(names: Iterable[str]) -> list[str]:
    """Return the safetensors files beside config.json that are the model's: neither a second format of it nor an adapter."""
    every = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name and not name.startswith("adapter_"))
    return [name for name in every if not name.startswith("consolidated")] or every


def check_weights(files: Iterable[str], names: Iterable[str], model: str, made_of: str = "") -> None:
    """Raise ModelError for shards that are missing, and for weights in a format that vLLM does not serve."""
    numbered = [match for match in map(SHARD.fullmatch, files) if match]
    if numbered:
        absent = int(numbered[0].group(2)) - len({match.group(1) for match in numbered})
        if absent > 0:
            raise ModelError(f"{model} lacks {absent} of the {int(numbered[0].group(2))} safetensors files that their names count.")
    others = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if not list(files) and not others and any(name.endswith(".gguf") for name in names):
        source = f", which is {made_of}" if made_of else ""
        raise ModelError(f"{model} holds its weights as GGUF alone, for llama.cpp; vLLM serves the repository that they were made from{source}.")


def adapter_sentence(model: str, described: Mapping[str, Any]) -> str:
    base = described.get("base_model_name_or_path")
    named = f" for {base}" if isinstance(base, str) and base else ""
    return f"{model} is an adapter (LoRA){named} and no model: serve the model as vllm_model, and the adapter with it by vllm_lora_adapters."


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's adapter_config.json, the names of its files, and the bytes that are still to be fetched."""

    described: dict[str, Any]
    names: tuple[str, ...]
    missing_bytes: int


def find_adapter(source: str, revision: str, directories: Iterable[Path], hub: Hub | None) -> AdapterFiles:
    """Return an adapter from a directory, else from a directory of models, else from the hub. Raises ModelError."""
    own = [Path(source)] if source.startswith("/") else [directory / own_name(source, revision) for directory in directories]
    for directory in own:
        try:
            described = parse_json((directory / "adapter_config.json").read_bytes(), f"adapter_config.json in {directory}")
            return AdapterFiles(described, tuple(file.name for file in directory.iterdir()), 0)
        except OSError:
            continue
    if source.startswith("/"):
        raise ModelError(f"{source} has no adapter_config.json, so there is no adapter.")
    if hub is None:
        raise ModelError(f"{source} is in none of the directories given, and the hub is not to be asked.")
    return hub.adapter(source, revision)


def own_name(source: str, revision: str) -> str:
    """Return how the role vllm names the directory of what it fetched."""
    return re.sub(r"[^A-Za-z0-9._-]+", "--", f"{source}@{revision or 'main'}")


def small_files(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return those of some files, by size, that describe a model and its tokenizer."""
    own = [name for name, size in sizes.items() if "/" not in name and 0 < size <= SMALL_LIMIT and name != INDEX]
    return tuple(sorted(name for name in own if any(fnmatch.fnmatch(name, pattern) for pattern in SMALL)))


def read_small(files: ModelFiles, model: str, hub: Hub | None) -> dict[str, bytes]:
    """Return the contents of the files that describe a model and its tokenizer. Raises ModelError."""
    if hub is None or files.origin != hub.url:
        try:
            return {name: (Path(files.origin) / name).read_bytes() for name in files.small}
        except OSError as error:
            raise ModelError(f"{error.filename} cannot be read: {error.strerror}.") from None
    return {name: hub.get(f"/{model}/resolve/{files.revision}/{quote(name)}", model, files.revision) for name in files.small}


def find_model(model: str, revision: str, directories: Iterable[Path], hub: Hub | None) -> ModelFiles:
    """Return the model from a directory, else from one of the caches, else from the hub. Raises ModelError."""
    if model.startswith("/"):
        return read_directory(Path(model), model)
    for directory in directories:
        found = in_cache(directory, model, revision)
        try:
            if found is not None:
                return read_directory(found, model)
        except ModelError:
            # A fetch that was interrupted is no reason not to plan, as long as the hub can say what is missing.
            if hub is None:
                raise
    if hub is None:
        raise ModelError(f"{model} is in none of the directories given, and the hub is not to be asked.")
    return hub.read(model, revision)


def in_cache(directory: Path, model: str, revision: str) -> Path | None:
    """Return the model's directory below a hub cache (models--OWNER--NAME/snapshots/COMMIT) or a directory of models, if it is complete there."""
    wanted = revision or "main"
    for root in (directory, directory / "hub"):
        repository = root / f"models--{model.replace('/', '--')}"
        reference = repository / "refs" / wanted
        commit = reference.read_text().strip() if reference.is_file() else wanted
        if (repository / "snapshots" / commit / "config.json").is_file():
            return repository / "snapshots" / commit
    own = directory / own_name(model, revision)
    return own if (own / "config.json").is_file() else None


def read_directory(directory: Path, name: str) -> ModelFiles:
    """Return the model in a directory. Raises ModelError."""
    try:
        config = parse_json((directory / "config.json").read_bytes(), f"config.json in {directory}")
    except FileNotFoundError:
        try:
            raise ModelError(adapter_sentence(name, parse_json((directory / "adapter_config.json").read_bytes(), "adapter_config.json"))) from None
        except OSError:
            pass
        if directory.is_dir() and any(directory.glob("*.gguf")):
            check_weights([], [file.name for file in directory.iterdir()], name)
        what = "has no config.json" if directory.is_dir() else "does not exist"
        raise ModelError(f"{directory} {what}, so there is no model to plan for.") from None
    except OSError as error:
        raise ModelError(f"{directory}/config.json cannot be read: {error.strerror}.") from None
    index = directory / INDEX
    if index.is_file():
        files = index_files(index.read_bytes(), name)
        absent = [file for file in files if not (directory / file).is_file()]
        if absent:
            raise ModelError(f"the safetensors index of {name} names {len(absent)} files that are not there, such as {absent[0]}.")
    else:
        names = [file.name for file in directory.iterdir()]
        files = own_weights(names)
        check_weights(files, names, name)
    small = small_files({file.name: file.stat().st_size for file in directory.iterdir() if file.is_file()})
    headers = [header(directory / file) for file in files]
    weights = sum(tensor_bytes(tensors, config) for tensors in headers) if files else None
    left_out = [place(tensor, name) for tensors in headers for name, tensor in tensors.items() if unused(name, config)]
    ahead = sum(end - start for start, end in left_out)
    return ModelFiles(config, weights, 0, str(directory), "", has_template(directory), small, ahead)


def has_template(directory: Path) -> bool | None:
    """Return whether a model in a directory has a chat template, None where no tokenizer says so."""
    if any((directory / name).is_file() for name in TEMPLATE_FILES):
        return True
    try:
        return b'"chat_template"' in (directory / "tokenizer_config.json").read_bytes()
    except OSError:
        return None


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ModelError(f"{what} is not JSON.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{what} does not hold an object.")
    return value


def index_files(text: bytes, name: str) -> list[str]:
    """Return the files that a safetensors index names. Raises ModelError."""
    weight_map = parse_json(text, f"the safetensors index of {name}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"the safetensors index of {name} has no weight_map.")
    files = sorted({str(file) for file in weight_map.values()})
    outside = [file for file in files if "/" in file or file.startswith(".")]
    if outside:
        raise ModelError(f"the safetensors index of {name} names {outside[0]!r}, which is no file beside it.")
    return files


def header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file, which is as long as its header says. Raises ModelError."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(HEADER_LIMIT, size - 8):
            raise ModelError(f"{file} is not a safetensors file, or cut short.")
        tensors = parse_json(stream.read(length), f"the header of {file}")
    tensors.pop("__metadata__", None)
    end = max((place(tensor, str(file))[1] for tensor in tensors.values()), default=0)
    if 8 + length + end > size:
        raise ModelError(f"{file} is cut short: it has {size:,} bytes of {8 + length + end:,}.")
    return tensors


def place(tensor: Any, file: str) -> tuple[int, int]:
    """Return where a tensor begins and ends in its file, in bytes. Raises ModelError."""
    offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
    numbers = [offset for offset in offsets if isinstance(offset, int) and not isinstance(offset, bool)] if isinstance(offsets, list) else []
    if len(numbers) != 2 or len(offsets or []) != 2 or not 0 <= numbers[0] <= numbers[1]:
        raise ModelError(f"the header of {file} describes a tensor without its place.")
    return numbers[0], numbers[1]


def tensor_bytes(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Return what vLLM keeps of some tensors: float32 as 16 bits unless quantised, and no layers beyond the model's (for speculative decoding)."""
    halved = not config.get("quantization_config")
    total = 0
    for name, tensor in tensors.items():
        if unused(name, config):
            continue
        start, end = place(tensor, name)
        size = end - start
        total += size // 2 if halved and tensor.get("dtype") == "F32" else size
    return total


class Hub:
    """A Hugging Face hub or a mirror of it. The token goes to it alone, not to where it redirects."""

    def __init__(self, url: str, token: str, timeout: float) -> None:
        if not url.startswith(("https://", "http://")):
            raise ModelError(f"the hub's address is {url!r}; allowed is an https URL.")
        if token and not url.startswith("https://"):
            raise ModelError(f"the hub's address is {url!r}; a token is only sent over https.")
        self.url = url.rstrip("/")
        self.token = token
        self.timeout = timeout

    def about(self, model: str, revision: str) -> tuple[dict[str, Any], str, dict[str, int]]:
        """Return what the hub says about a repository, its commit, and the sizes of its files. Raises ModelError."""
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model, re.ASCII):
            raise ModelError(f"{model!r} is neither an id on the hub, such as Qwen/Qwen3-8B, nor an absolute path.")
        wanted = quote(revision or "main", safe="")
        found = parse_json(self.get(f"/api/models/{model}/revision/{wanted}?blobs=true", model, revision), f"what the hub says about {model}")
        return found, str(found.get("sha") or revision or "main"), sizes_of(found, model)

    def adapter(self, source: str, revision: str) -> AdapterFiles:
        """Return an adapter. Raises ModelError."""
        _about, commit, sizes = self.about(source, revision)
        if "adapter_config.json" not in sizes:
            raise ModelError(f"{source} has no adapter_config.json on the hub, so it is no adapter.")
        text = self.get(f"/{source}/resolve/{commit}/adapter_config.json", source, revision)
        return AdapterFiles(parse_json(text, f"adapter_config.json of {source}"), tuple(sizes), sum(sizes.values()))

    def read(self, model: str, revision: str) -> ModelFiles:
        """Return the model. Raises ModelError."""
        about, commit, sizes = self.about(model, revision)
        if "config.json" not in sizes:
            if "adapter_config.json" in sizes:
                path = f"/{model}/resolve/{commit}/adapter_config.json"
                raise ModelError(adapter_sentence(model, parse_json(self.get(path, model, revision), f"adapter_config.json of {model}")))
            check_weights([], sizes, model, base_of(about))
            raise ModelError(f"{model} has no config.json on the hub, so it is no model that vLLM could serve.")
        config = parse_json(self.get(f"/{model}/resolve/{commit}/config.json", model, revision), f"config.json of {model}")
        ahead = 0
        if INDEX in sizes:
            index = self.get(f"/{model}/resolve/{commit}/{INDEX}", model, revision)
            files = index_files(index, model)
            ahead = self.unused_bytes(index, config, f"/{model}/resolve/{commit}/", model, revision)
            absent = [file for file in files if file not in sizes]
            if absent:
                raise ModelError(f"the safetensors index of {model} names {len(absent)} files that the hub does not have, such as {absent[0]}.")
        else:
            files = own_weights(sizes)
            check_weights(files, sizes, model, base_of(about))
        weights = (sum(sizes[file] for file in files) - ahead) or None
        if weights is not None and not config.get("quantization_config"):
            weights = max(0, weights - float32_bytes(about) // 2)
        fetched = sum(size for file, size in sizes.items() if not (files and any(fnmatch.fnmatch(file, pattern) for pattern in OTHER_WEIGHTS)))
        template = True if any(name in sizes for name in TEMPLATE_FILES) else None
        if template is None and "tokenizer_config.json" in sizes:
            template = b'"chat_template"' in self.get(f"/{model}/resolve/{commit}/tokenizer_config.json", model, revision)
        return ModelFiles(config, weights, fetched, self.url, commit, template, small_files(sizes), ahead)

    def unused_bytes(self, index: bytes, config: Mapping[str, Any], where: str, model: str, revision: str) -> int:
        """Return the bytes of tensors that vLLM leaves out, from the headers of the few files that hold them. Without an answer none is left out."""
        places = {str(name): str(file) for name, file in parse_json(index, "the safetensors index")["weight_map"].items() if unused(str(name), config)}
        total = 0
        for file in sorted(set(places.values())):
            try:
                length = struct.unpack("<Q", self.get(where + file, model, revision, (0, 8)))[0]
                if not 0 < length <= ANSWER_LIMIT:
                    continue
                tensors = parse_json(self.get(where + file, model, revision, (8, length)), f"the header of {file}")
                total += sum(end - start for start, end in (place(tensors[name], file) for name, at in places.items() if at == file))
            except (ModelError, KeyError, struct.error):
                continue
        return total

    def get(self, path: str, model: str, revision: str, part: tuple[int, int] | None = None) -> bytes:
        """Return an answer's body, or some bytes of it from a place on. Raises ModelError."""
        headers = {"Range": f"bytes={part[0]}-{part[0] + part[1] - 1}"} if part else {}
        secret = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        end = time.monotonic() + SLOWEST * self.timeout
        try:
            # No password of the host's own ~/.netrc goes to the hub.
            with open_url(
                self.url + path,
                headers=headers | secret,
                unredirected_headers=list(secret),
                http_agent="selfhosted.agent_stack",
                timeout=self.timeout,
                use_netrc=False,
            ) as answer:
                if part:
                    # A server that knows no ranges answers with the whole.
                    self.body(answer, part[0] if answer.status == 200 else 0, model, end)
                    return self.body(answer, part[1], model, end)
                body = self.body(answer, ANSWER_LIMIT + 1, model, end)
        except HTTPError as error:
            raise ModelError(self.refusal(error, model, revision)) from None
        except (URLError, OSError, HTTPException) as error:
            raise ModelError(f"no answer from {self.url} about {model}: {getattr(error, 'reason', error)}.") from None
        if len(body) > ANSWER_LIMIT:
            raise ModelError(f"{self.url} answers with more than {ANSWER_LIMIT:,} bytes about {model}, which is no description of a model.")
        return body

    def body(self, answer: Any, most: int, model: str, end: float) -> bytes:
        """Return at most so many bytes of an answer. Raises ModelError for one that comes in drops, which no timeout of the socket ends."""
        found = bytearray()
        while len(found) < most and (piece := answer.read1(min(65536, most - len(found)))):
            found += piece
            if time.monotonic() > end:
                raise ModelError(f"{self.url} is too slow: it did not tell about {model} within {SLOWEST * self.timeout:g} s.")
        return bytes(found)

    def refusal(self, error: HTTPError, model: str, revision: str) -> str:
        code = error.headers.get("X-Error-Code", "")
        if code == "RevisionNotFound":
            return f"{model} has no revision {revision or 'main'} on the hub."
        if code == "GatedRepo" or (error.code == 403 and not code):
            if self.token:
                return f"{model} is gated, and the token may not read it: accept its licence on the hub with the token's account."
            return f"{model} is gated: accept its licence on the hub and give a token that may read it."
        if error.code in (401, 404):
            hidden = "the token may not read it" if self.token else "it is private, and no token was given"
            return f"the hub has no model {model}, or {hidden}."
        return f"{self.url} answered {error.code} about {model}."


def base_of(about: Mapping[str, Any]) -> str:
    """Return the model that a repository says it was made from, or nothing."""
    card = about.get("cardData")
    base = card.get("base_model") if isinstance(card, dict) else None
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) else ""


def sizes_of(about: Mapping[str, Any], model: str) -> dict[str, int]:
    """Return the size of each file of a repository, in bytes. Raises ModelError."""
    files = about.get("siblings") or []
    if not isinstance(files, list) or not all(isinstance(file, dict) and isinstance(file.get("rfilename"), str) for file in files):
        raise ModelError(f"what the hub says about {model} does not list its files.")
    return {file["rfilename"]: whole(file.get("size")) for file in files}


def whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def float32_bytes(about: Mapping[str, Any]) -> int:
    counted = about.get("safetensors")
    parameters = counted.get("parameters") if isinstance(counted, dict) else None
    return 4 * whole(parameters.get("F32")) if isinstance(parameters, dict) else 0
