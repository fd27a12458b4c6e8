"""Where a model's files are: directories, caches, and a hub that answers as Hugging Face's does."""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _model_files
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._model_files import (
    INDEX,
    SMALL_LIMIT,
    Hub,
    ModelError,
    find_model,
    read_directory,
    read_small,
    small_files,
)
from hypothesis import given, settings
from hypothesis import strategies as st

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}


def safetensors(tensors: dict[str, tuple[str, int]], cut: int = 0) -> bytes:
    """A file with tensors of a type and a number of bytes."""
    header, start = {}, 0
    for name, (dtype, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [start, start + size]}
        start += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(start)
    return content[: len(content) - cut]


def model(directory: Path, config: dict[str, Any] | None = None, **files: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    for name, content in files.items():
        (directory / name.replace("__", ".").replace("DASH", "-")).write_bytes(content)
    return directory


def sharded(directory: Path, config: dict[str, Any] | None = None, second: bytes | None = None) -> Path:
    first = safetensors({"model.layers.0.w": ("BF16", 1000), "model.layers.2.w": ("BF16", 50)})
    files = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second or safetensors({"lm_head": ("BF16", 500)})}
    model(directory, config)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    weight_map = {"model.layers.0.w": "model-00001-of-00002.safetensors", "lm_head": "model-00002-of-00002.safetensors"}
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1550}, "weight_map": weight_map}))
    return directory


def test_a_sharded_directory(tmp_path: Path) -> None:
    """Without the layer beyond the model's two: those are for speculative decoding, and vLLM leaves them out."""
    found = read_directory(sharded(tmp_path), "m")
    assert (found.weight_bytes, found.missing_bytes, found.origin) == (1500, 0, str(tmp_path))


def test_files_beside_the_index_do_not_count_twice(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(safetensors({"w": ("BF16", 1550)}))
    assert read_directory(tmp_path, "m").weight_bytes == 1500


def test_float32_is_served_in_16_bits_unless_it_belongs_to_a_quantisation(tmp_path: Path) -> None:
    weights = safetensors({"w": ("F32", 1000), "v": ("BF16", 10)})
    assert read_directory(model(tmp_path / "a", model__safetensors=weights), "m").weight_bytes == 510
    assert read_directory(model(tmp_path / "b", {"quantization_config": {"quant_method": "fp8"}}, model__safetensors=weights), "m").weight_bytes == 1010


def test_a_directory_without_safetensors_has_only_its_config(tmp_path: Path) -> None:
    assert read_directory(model(tmp_path, pytorch_model__bin=b"GGUF"), "m").weight_bytes is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (INDEX, b"{", "the safetensors index of m is not JSON."),
        (INDEX, b"[]", "the safetensors index of m does not hold an object."),
        (INDEX, b'{"metadata": {}}', "the safetensors index of m has no weight_map."),
        (INDEX, b'{"weight_map": {"w": "model-9.safetensors"}}', "names 1 files that are not there, such as model-9.safetensors."),
        (INDEX, b'{"weight_map": {"w": "../../etc/shadow"}}', "names '../../etc/shadow', which is no file beside it."),
        ("config.json", b"<html>", "is not JSON."),
        ("model-00002-of-00002.safetensors", b"", "is not a safetensors file, or cut short."),
        ("model-00002-of-00002.safetensors", b"\xff" * 100, "is not a safetensors file, or cut short."),
        ("model-00002-of-00002.safetensors", safetensors({"lm_head": ("BF16", 500)}, cut=1), "is cut short: it has "),
        ("model-00002-of-00002.safetensors", struct.pack("<Q", 12) + b'{"a": {"b":}', "is not JSON."),
        ("model-00002-of-00002.safetensors", struct.pack("<Q", 9) + b'{"a": {}}', "describes a tensor without its place."),
    ],
)
def test_broken_directories(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (sharded(tmp_path) / name).write_bytes(content)
    with pytest.raises(ModelError) as error:
        read_directory(tmp_path, "m")
    assert said in str(error.value)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not exist, so there is no model"):
        find_model(f"{tmp_path}/none", "", [], None)
    with pytest.raises(ModelError, match=r"has no config\.json"):
        find_model(str(tmp_path), "", [], None)


def test_a_hub_cache_and_the_roles_own_directory(tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "hub" / "models--owner--name"
    sharded(repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123\n")
    sharded(tmp_path / "models" / "owner--other--main")
    for directory, name, revision in (
        ("cache", "owner/name", ""),
        ("cache", "owner/name", "abc123"),
        ("cache/hub", "owner/name", "main"),
        ("models", "owner/other", ""),
    ):
        assert find_model(name, revision, [tmp_path / "none", tmp_path / directory], None).weight_bytes == 1500
    with pytest.raises(ModelError, match="is in none of the directories given, and the hub is not to be asked"):
        find_model("owner/name", "def456", [tmp_path / "cache"], None)


class FakeHub(BaseHTTPRequestHandler):
    """Answers as huggingface.co does, codes and headers included."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str | None]]
    files: dict[str, bytes]
    about: bytes | None
    elsewhere: str
    url: str

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Authorization")))
        path, token = self.path.partition("?")[0], self.headers.get("Authorization")
        if "/missing/" in path:
            self.reply(401, b'{"error":"Invalid username or password."}', "RepoNotFound")
        elif "/revision/nope" in path:
            self.reply(404, b'{"error":"Invalid rev id: nope"}', "RevisionNotFound")
        elif "/gated/" in path and "/resolve/" in path and token != "Bearer good":
            self.reply(403 if token else 401, b"", "GatedRepo")
        elif "/broken/" in path:
            self.reply(500, b"")
        elif "/html/" in path:
            self.reply(200, b"<html>")
        elif "/drops/" in path:
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b" ")
                time.sleep(0.05)
        elif "/silent/" in path:
            time.sleep(3)
        elif "/cut/" in path:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"{")
            self.close_connection = True
        elif self.about is not None and path.startswith("/api/models/"):
            self.reply(200, self.about)
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            about = {"sha": "c0ffee", "siblings": siblings, "safetensors": {"parameters": {"BF16": 100, "F32": 50}}}
            self.reply(200, json.dumps(about).encode())
        elif path.endswith("config.json") and self.elsewhere:
            self.reply(302, b"", location=self.elsewhere)
        else:
            self.reply(200, self.files[path.rpartition("/")[2]])

    def reply(self, status: int, body: bytes, code: str = "", location: str = "") -> None:
        self.send_response(status)
        for name, value in (("X-Error-Code", code), ("Location", location), ("Content-Length", str(len(body)))):
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[type[FakeHub]]:
    class Running(FakeHub):
        pass

    Running.seen, Running.elsewhere, Running.about = [], "", None
    Running.files = {
        "config.json": json.dumps(CONFIG).encode(),
        INDEX: json.dumps({"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}).encode(),
        "model-1.safetensors": bytes(1000),
        "model-2.safetensors": bytes(400),
        "consolidated.safetensors": bytes(1400),
        "original/consolidated.00.pth": bytes(1400),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Running)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Running.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield Running
    finally:
        server.shutdown()
        server.server_close()


def asked(hub: Any, name: str, token: str = "", revision: str = "") -> Any:
    asking = Hub(hub.url, "", 20)
    asking.token = token  # over http only here, see test_a_token_is_only_sent_over_https
    return find_model(name, revision, [], asking)


def test_the_hub_is_asked_for_sizes_and_not_for_weights(hub: Any) -> None:
    found = asked(hub, "owner/name")
    # 200 bytes of float32 are served as 100.
    assert (found.weight_bytes, found.revision, found.config) == (1300, "c0ffee", CONFIG)
    assert found.missing_bytes == sum(len(hub.files[name]) for name in ("config.json", INDEX, "model-1.safetensors", "model-2.safetensors"))
    assert [path for path, _ in hub.seen if "model-" in path] == []


@pytest.mark.parametrize(
    ("name", "token", "revision", "said"),
    [
        ("missing/name", "", "", "the hub has no model missing/name, or it is private, and no token was given."),
        ("missing/name", "good", "", "the hub has no model missing/name, or the token may not read it."),
        ("gated/name", "", "", "gated/name is gated: accept its licence on the hub and give a token that may read it."),
        ("gated/name", "bad", "", "gated/name is gated, and the token may not read it: accept its licence on the hub with the token's account."),
        ("owner/name", "", "nope", "owner/name has no revision nope on the hub."),
        ("broken/name", "", "", "answered 500 about broken/name."),
        ("html/name", "", "", "what the hub says about html/name is not JSON."),
        ("cut/name", "", "", "cut/name"),
        ("../../etc", "", "", "'../../etc' is neither an id on the hub, such as Qwen/Qwen3-8B, nor an absolute path."),
        ("owner/name?x", "", "", "is neither an id on the hub"),
    ],
)
def test_what_the_hub_refuses(hub: Any, name: str, token: str, revision: str, said: str) -> None:
    with pytest.raises(ModelError) as error:
        asked(hub, name, token, revision)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "slowest", "timeout", "said"),
    [
        # Each drop in time, and all of them not.
        ("drops/name", 0.2, 2.0, "is too slow: it did not tell about drops/name within 0.4 s."),
        ("silent/name", 4, 0.3, "about silent/name: "),
    ],
)
def test_a_slow_hub(hub: Any, monkeypatch: pytest.MonkeyPatch, name: str, slowest: float, timeout: float, said: str) -> None:
    monkeypatch.setattr(_model_files, "SLOWEST", slowest)
    with pytest.raises(ModelError) as error:
        Hub(hub.url, "", timeout).read(name, "")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (b"[" * 100_000, "what the hub says about owner/name is not JSON."),
        (b'{"siblings": 7}', "what the hub says about owner/name does not list its files."),
        (b'{"siblings": [7]}', "what the hub says about owner/name does not list its files."),
        (b'{"siblings": [{"rfilename": ["config.json"]}]}', "what the hub says about owner/name does not list its files."),
        (b'{"siblings": [{"rfilename": "README.md", "size": "large"}]}', "owner/name has no config.json on the hub"),
    ],
)
def test_a_hub_that_says_something_else(hub: Any, about: bytes, said: str) -> None:
    hub.about = about
    with pytest.raises(ModelError) as error:
        asked(hub, "owner/name")
    assert said in str(error.value)


ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["rfilename", "size", "parameters", "F32", "a"]), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("sha", "siblings", "safetensors", "cardData"), ANY)), ANY, ANY)
def test_no_answer_of_a_hub_ends_in_a_traceback(about: Any, index: Any, config: Any) -> None:
    """Its description of the repository, the index and config.json, whatever JSON they are."""
    files = [{"rfilename": name, "size": 10} for name in ("config.json", INDEX, "model-1.safetensors")]

    def get(path: str, model: str, revision: str, part: tuple[int, int] | None = None) -> bytes:
        if path.startswith("/api/"):
            return json.dumps({"siblings": files} | about).encode()
        return json.dumps(index if path.endswith(INDEX) else config).encode()

    asking = Hub("http://hub", "", 1)
    asking.get = get
    with contextlib.suppress(ModelError):
        asking.read("owner/name", "")


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.text(max_size=3), st.one_of(ANY, st.fixed_dictionaries({"data_offsets": st.lists(ANY, max_size=3)})), max_size=3))
def test_no_header_ends_in_a_traceback(tensors: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(ModelError):
        text = json.dumps(tensors).encode()
        model(Path(directory), model__safetensors=struct.pack("<Q", len(text)) + text)
        read_directory(Path(directory), "m")


def test_a_gated_model_with_the_right_token(hub: Any) -> None:
    assert asked(hub, "gated/name", "good").weight_bytes == 1300


def test_the_hubs_index_names_a_file_that_it_does_not_have(hub: Any) -> None:
    hub.files.pop("model-2.safetensors")
    with pytest.raises(ModelError, match=r"names 1 files that the hub does not have, such as model-2\.safetensors"):
        asked(hub, "owner/name")


def test_a_repository_that_is_no_model(hub: Any) -> None:
    hub.files.pop("config.json")
    with pytest.raises(ModelError, match=r"owner/name has no config\.json on the hub"):
        asked(hub, "owner/name")


def test_no_hub_answers() -> None:
    with pytest.raises(ModelError, match=r"no answer from http://127\.0\.0\.1:9 about owner/name"):
        Hub("http://127.0.0.1:9", "", 2).read("owner/name", "")


def test_the_token_does_not_follow_a_redirect(hub: Any) -> None:
    hub.elsewhere = f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/config.json.real"
    hub.files["config.json.real"] = hub.files["config.json"]
    asked(hub, "owner/name", "good")
    assert ("/cdn/config.json.real", None) in hub.seen
    assert {token for path, token in hub.seen if not path.startswith("/cdn/")} == {"Bearer good"}


def test_a_token_is_only_sent_over_https() -> None:
    with pytest.raises(ModelError, match="a token is only sent over https"):
        Hub("http://mirror.example.com", "secret", 2)
    with pytest.raises(ModelError, match="allowed is an https URL"):
        Hub("file:///etc", "", 2)


def test_an_interrupted_fetch_is_completed_from_the_hub(tmp_path: Path, hub: Any) -> None:
    cached = sharded(tmp_path / "owner--name--main")
    (cached / "model-00002-of-00002.safetensors").unlink()
    assert find_model("owner/name", "", [tmp_path], Hub(hub.url, "", 20)).weight_bytes == 1300
    with pytest.raises(ModelError, match="names 1 files that are not there"):
        find_model("owner/name", "", [tmp_path], None)


def test_layers_of_a_text_part_and_heads_that_guess_ahead_are_left_out(tmp_path: Path) -> None:
    tensors = {"model.language_model.layers.1.w": ("BF16", 100), "model.language_model.layers.2.w": ("BF16", 7), "mtp.fc.w": ("BF16", 9)}
    directory = model(tmp_path / "m", {"num_hidden_layers": None, "text_config": {"num_hidden_layers": 2}})
    (directory / "model.safetensors").write_bytes(safetensors(tensors | {"vision_tower.layers.30.w": ("BF16", 5)}))
    (directory / "adapter_model.safetensors").write_bytes(safetensors({"lora": ("BF16", 1000)}))
    assert read_directory(directory, "m").weight_bytes == 105


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": b"{}", "model-00001-of-00003.safetensors": safetensors({"w": ("BF16", 2)})}, "m lacks 2 of the 3 safetensors files"),
        (
            {"config.json": b"{}", "m-Q4_K_M.gguf": b""},
            "m holds its weights as GGUF alone, for llama.cpp; vLLM serves the repository that they were made from.",
        ),
        ({"m-Q4_K_M.gguf": b""}, "m holds its weights as GGUF alone"),
        ({"adapter_config.json": b'{"base_model_name_or_path": "Qwen/Qwen3-8B"}'}, "m is an adapter (LoRA) for Qwen/Qwen3-8B and no model: serve the model"),
    ],
)
def test_directories_that_hold_no_model(tmp_path: Path, files: dict[str, bytes], said: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError) as error:
        read_directory(tmp_path, "m")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": b"{}"}, False),
        ({"tokenizer_config.json": b'{"chat_template": "x"}'}, True),
        ({"tokenizer_config.json": b"{}", "chat_template.jinja": b""}, True),
        ({"tekken.json": b"{}"}, True),
    ],
)
def test_whether_there_is_a_chat_template(tmp_path: Path, files: dict[str, bytes], expected: bool | None) -> None:
    directory = model(tmp_path / "m")
    for name, content in files.items():
        (directory / name).write_bytes(content)
    assert read_directory(directory, "m").chat_template is expected


def test_what_guesses_ahead_is_known_apart(tmp_path: Path) -> None:
    tensors = {"model.layers.0.w": ("BF16", 100), "model.layers.2.w": ("BF16", 7), "mtp.fc.w": ("BF16", 9)}
    found = read_directory(model(tmp_path / "m", model__safetensors=safetensors(tensors)), "m")
    assert (found.weight_bytes, found.ahead_bytes) == (100, 16)


def test_small_files_are_read_and_large_ones_are_not(tmp_path: Path, hub: Any) -> None:
    directory = model(tmp_path / "m", tokenizer__json=b"{}", model__safetensors=safetensors({"w": ("BF16", 2)}), weights__bin=b"")
    (directory / "deeper").mkdir()
    found = read_directory(directory, "m")
    assert found.small == ("config.json", "tokenizer.json")
    assert read_small(found, str(directory), None)["tokenizer.json"] == b"{}"
    assert small_files({"vocab.txt": SMALL_LIMIT + 1, "merges.txt": 5, INDEX: 5, "sub/config.json": 5}) == ("merges.txt",)
    asking = Hub(hub.url, "", 20)
    assert read_small(asking.read("owner/name", ""), "owner/name", asking) == {"config.json": hub.files["config.json"]}
