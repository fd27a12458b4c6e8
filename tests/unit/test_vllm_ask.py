"""vLLM itself is asked inside its image: what is read of its answers, how Docker is called, and what is said where either goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_ask as asking
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_plan as plan_of
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_config import PlanError
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_specs import (
    CHUNKED,
    FULL,
    GATED_DELTA,
    INDEXER,
    LATENT,
    SLIDING,
    SLIDING_LATENT,
    STATE,
    Cache,
    Layer,
)
from ansible_collections.selfhosted.agent_stack.plugins.modules import vllm_plan
from test_vllm_plan_module import H100, plan_parameters

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).parent / "data"
PROGRAM = ROOT / "roles" / "vllm" / "files" / "ask_vllm.py"
PLANS: dict[str, dict[str, Any]] = json.loads((DATA / "plans.json").read_text())
SIZES = {
    "layers": 36,
    "hidden": 4096,
    "heads": 32,
    "kv_heads": 8,
    "intermediate": 12288,
    "experts": 0,
    "active_experts": 1,
    "expert_intermediate": 12288,
    "vocabulary": 151936,
}
COUNTED = {"embedding": 1_244_659_712, "linear": 6_945_767_424, "experts": 0, "other": 308_224}
WHOLE = {"kind": "FullAttention", "block": 128, "bytes": 524_288, "element": 2, "count": 36}


def said(**gpus: Any) -> str:
    """What the program prints for some numbers of GPUs, after what vLLM has logged."""
    answers = {name.removeprefix("on"): {"sizes": SIZES, "parameters": COUNTED, "context": 40960, "layers": [WHOLE]} | entry for name, entry in gpus.items()}
    return f"WARNING 11-27 12:00:01 [cpu.py:1] something\n{asking.MARK}{json.dumps({'vllm': '0.33.0', 'gpus': answers})}\n"


# ------------------------------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    ("entry", "layer"),
    [
        (WHOLE, Layer(FULL, 36, 4096)),
        ({"kind": "RSWA", "block": 16, "bytes": 65536, "element": 2, "count": 3}, Layer(FULL, 3, 4096)),
        ({"kind": "SlidingWindow", "block": 128, "bytes": 524288, "element": 2, "sliding_window": 1024, "count": 5}, Layer(SLIDING, 5, 4096, 1024)),
        ({"kind": "FullAttention", "block": 128, "bytes": 524288, "element": 2, "sliding_window": 1024, "count": 5}, Layer(FULL, 5, 4096)),
        ({"kind": "ChunkedLocalAttention", "block": 64, "bytes": 6400, "element": 2, "attention_chunk_size": 8192, "count": 1}, Layer(CHUNKED, 1, 100, 8192)),
        ({"kind": "MLAAttention", "block": 16, "bytes": 18432, "element": 2, "count": 61}, Layer(LATENT, 61, 1152)),
        ({"kind": "MLAAttention", "block": 16, "bytes": 2112, "element": 1, "count": 61}, Layer(LATENT, 61, 132, role=INDEXER)),
        (
            {"kind": "MLAAttention", "block": 256, "bytes": 37376, "element": 1, "tokens_per_entry": 4.0, "alignment": 576, "count": 20},
            Layer(LATENT, 20, 584, tokens_per_entry=4, block=256, alignment=576),
        ),
        (
            {"kind": "SlidingWindowMLA", "block": 64, "bytes": 37376, "element": 1, "sliding_window": 128, "alignment": 576, "count": 43},
            Layer(SLIDING_LATENT, 43, 584, 128, block=64, alignment=576),
        ),
        ({"kind": "Mamba", "state_bytes": 1097728, "type": "gdn_attn", "count": 36}, Layer(STATE, 36, 1097728, role=GATED_DELTA)),
        ({"kind": "Mamba", "state_bytes": 573440, "type": "mamba1", "count": 28}, Layer(STATE, 28, 573440)),
    ],
)
def test_a_specification_is_a_layer(entry: dict[str, Any], layer: Layer) -> None:
    assert asking.layer_of(entry)[0] == layer


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "vLLM's image did not say what the model caches; its last words were 'none'."),
        ("Killed", "vLLM's image did not say what the model caches; its last words were 'Killed'."),
        (f"{asking.MARK}[1]", "did not say what the model caches"),
        (f"{asking.MARK}{{", "did not say what the model caches"),
        (said(on1={"error": "ValueError: unknown rope"}), "vLLM itself does not build the model: ValueError: unknown rope."),
        (said(on1={"layers": [{"kind": "CrossAttention", "count": 2}]}), "the model has layers of the kind 'CrossAttention', whose cache is not planned."),
        (said(on1={"layers": [WHOLE | {"bytes": -1}]}), "described the model in a form not known"),
        (said(on1={"layers": [WHOLE | {"block": 0}]}), "described the model in a form not known"),
        (said(on1={"sizes": {}}), "described the model in a form not known"),
        (said(on1={"context": "long"}), "described the model in a form not known"),
    ],
)
def test_answers_that_are_none(text: str, reason: str) -> None:
    with pytest.raises(PlanError) as error:
        asking.read_answer(text)
    assert reason in str(error.value)


def test_eight_bits_halve_keys_and_values_and_no_state() -> None:
    layers = [WHOLE, {"kind": "Mamba", "state_bytes": 1000, "count": 2}, {"kind": "MLAAttention", "block": 16, "bytes": 2112, "element": 1, "count": 3}]
    answer = asking.read_answer(said(on1={"layers": layers}))
    assert [layer.bytes for layer in answer.caches(1, 2)] == [4096, 1000, 132]
    assert [layer.bytes for layer in answer.caches(1, 1)] == [2048, 1000, 132]


@pytest.mark.parametrize(("gpus", "wanted", "numbers"), [(0, 0, [1]), (1, 1, [1]), (3, 0, [1, 2]), (8, 0, [1, 2, 4, 8]), (6, 6, [1, 2, 4, 6])])
def test_numbers_of_gpus_to_ask_for(gpus: int, wanted: int, numbers: list[int]) -> None:
    assert asking.counts(gpus, wanted) == numbers


@pytest.mark.parametrize("name", sorted(PLANS))
def test_the_answer_and_the_formula_say_the_same(name: str) -> None:
    """The same plan comes of vLLM's own words as of the formula, for every model that vLLM was recorded for."""
    config = {key: value for key, value in json.loads((DATA / "models" / f"{name}.json").read_text()).items() if key != "quantization_config"}
    told = {asking.layer_of(entry)[0] for entry in PLANS[name]["layers"]}
    known = plan_of.read_shape(config).caches(Cache())

    def alike(layers: Any) -> list[tuple[Any, ...]]:
        return sorted((layer.kind, layer.count, layer.bytes, layer.window, layer.tokens_per_entry, not layer.block and layer.role) for layer in layers)

    assert alike(told) == alike(known)


# ------------------------------------------------------------------------------------------------------------------------- asking

# A program that fails as Docker's client does. What it is to do stands in the environment.
STAND_IN = """#!{python}
import json, os, sys, time
entered = sys.stdin.read() if "--interactive" in sys.argv else ""
with open(os.environ["SEEN"], "a") as seen:
    mounted = next((word.rpartition(":/model")[0] for word in sys.argv if ":/model" in word), "")
    files = {{name: os.stat(os.path.join(mounted, name)).st_mode & 0o777 for name in sorted(os.listdir(mounted))}} if mounted else {{}}
    seen.write(json.dumps({{"arguments": sys.argv[1:], "entered": entered, "files": files}}) + chr(10))
does = os.environ["DOES"]
if sys.argv[1:3] == ["image", "inspect"]:
    if does == "absent":
        sys.exit("Error response from daemon: No such image: vllm/vllm-openai:v0.33.0")
    if does == "down":
        sys.exit("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?")
    print(os.environ.get("IMAGE", "sha256:aaaa"))
elif sys.argv[1] == "run":
    if does == "killed":
        sys.exit(137)
    if does == "refused":
        sys.stderr.write('docker: Error response from daemon: exec: "python3": executable file not found in $PATH' + chr(10))
        sys.exit(127)
    if does == "hangs":
        time.sleep(60)
    sys.stdout.write(os.environ["SAYS"])
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Put a stand-in for Docker first on the path, and return a function that says what it does, and what it was called with."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    seen = tmp_path / "seen"
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setenv("DOES", "answers")
    monkeypatch.setenv("SAYS", said(on1={}))

    def control(**change: str) -> list[dict[str, Any]]:
        for name, value in change.items():
            monkeypatch.setenv(name.upper(), value)
        return [json.loads(line) for line in seen.read_text().splitlines()] if seen.exists() else []

    return control


IMAGE = "vllm/vllm-openai:v0.33.0"
FILES = {"config.json": b"{}", "tokenizer.json": b"[]"}


def ask(kept: Path | None = None, gpus: tuple[int, ...] = (1, 2), files: dict[str, bytes] = FILES) -> asking.Answer:
    return asking.ask("docker", IMAGE, "print('hello')", files, list(gpus), kept)


def test_the_container_gets_the_files_and_nothing_else(docker: Callable[..., list[dict[str, Any]]]) -> None:
    answer = ask()
    inspected, ran = docker()
    assert inspected["arguments"] == ["image", "inspect", "--format", "{{.Id}}", IMAGE]
    arguments = ran["arguments"]
    for pair in (("--network", "none"), ("--cap-drop", "ALL"), ("--user", "10001:10001"), ("--entrypoint", "python3")):
        assert arguments[arguments.index(pair[0]) + 1] == pair[1]
    assert {"--rm", "--read-only"} <= set(arguments)
    assert not [word for word in arguments if "gpus" in word or "device" in word]
    assert arguments[-5:] == [IMAGE, "-", "/model", "1", "2"]
    assert (ran["entered"], ran["files"]) == ("print('hello')", {"config.json": 0o644, "tokenizer.json": 0o644})
    assert (answer.max_context, answer.sizes["layers"], answer.caches(1, 2)) == (40960, 36, (Layer(FULL, 36, 4096),))


def test_a_model_is_asked_for_once(docker: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    kept = tmp_path / "asked"
    first = ask(kept)
    assert ask(kept) == first
    assert [call["arguments"][0] for call in docker()] == ["image", "run", "image"]
    # Another image, another file, another number of GPUs, or an answer that was cut off: again.
    docker(image="sha256:bbbb")
    ask(kept)
    ask(kept, gpus=(1,))
    ask(kept, files={"config.json": b"{} "})
    for file in kept.iterdir():
        file.write_text(asking.MARK)
    assert ask(kept) == ask(kept)
    assert [call["arguments"][0] for call in docker()].count("run") == 5


@pytest.mark.parametrize(
    ("does", "says", "reason"),
    [
        ("down", "", "docker cannot be asked for the image vllm/vllm-openai:v0.33.0: 'Cannot connect to the Docker daemon at"),
        ("killed", "", "vLLM's image ended with 137 when it was asked what the model caches: 'none'."),
        ("refused", "", "vLLM's image ended with 127 when it was asked what the model caches: 'docker: Error response from daemon"),
        ("answers", "Traceback (most recent call last):\nImportError: no\n", "its last words were 'ImportError: no'."),
        ("hangs", "", "vLLM did not say within 1 s what the model caches."),
    ],
)
def test_it_is_one_sentence(docker: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, does: str, says: str, reason: str) -> None:
    docker(does=does, says=says)
    monkeypatch.setattr(asking, "PATIENCE_SECONDS", 1)
    with pytest.raises(PlanError) as error:
        ask()
    assert reason in str(error.value)
    assert str(error.value).count("\n") == 0
    if does == "hangs":
        name = docker()[1]["arguments"][4]
        assert docker()[2]["arguments"] == ["rm", "--force", name]


def test_an_image_that_is_not_there_yet(docker: Callable[..., list[dict[str, Any]]]) -> None:
    docker(does="absent")
    with pytest.raises(asking.ImageAbsent, match=r"the image vllm/vllm-openai:v0\.33\.0 is not on this host yet"):
        ask()
    with pytest.raises(asking.ImageAbsent, match="there is no Docker on this host yet"):
        asking.ask(None, IMAGE, "", FILES, [1], None)


# ----------------------------------------------------------------------------------------------------------- the module that asks


def unknown(directory: Path, **change: Any) -> str:
    """A model of an architecture that vLLM has and no formula knows."""
    directory.mkdir(exist_ok=True)
    config = {"architectures": ["Plamo3ForCausalLM"], "model_type": "plamo3", "some_words": "of its own"} | change
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def planned(model: str, check_mode: bool = False, **params: Any) -> dict[str, Any]:
    more = {"image": IMAGE, "asker": "program", "asked_directory": "", "max_model_len": 8192} | params
    return dict(vllm_plan.make_result(plan_parameters(model, **more), check_mode=check_mode))


def test_a_model_is_planned_by_what_vllm_says(docker: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    result = planned(unknown(tmp_path / "plamo"))
    assert (result["planned_by"], result["pending"], result["fits"]) == ("vllm", False, True)
    assert result["layers"] == [{"kind": "full", "layers": 36, "bytes": 4096}]
    # 8.19 billion parameters of 16 bits.
    assert result["weights_mib"] == 2 * 8_190_735_360 // 2**20
    assert result["kv_bytes_per_token"] == 36 * 4096
    assert (result["model_info"]["max_context"], result["tool_call_parser"]) == (40960, "plamo3")
    assert any("vLLM itself was asked" in warning for warning in result["warnings_found"])
    assert docker()[1]["files"] == {"config.json": 0o644}
    assert planned(unknown(tmp_path / "plamo"), kv_cache_dtype="fp8")["kv_bytes_per_token"] == 36 * 2048


def test_before_the_image_is_there_the_plan_is_pending(docker: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    docker(does="absent")
    model = unknown(tmp_path / "plamo", **json.loads((DATA / "models" / "llama-3.1-8b.json").read_text()) | {"architectures": ["Plamo3ForCausalLM"]})
    for check_mode in (True, False):
        result = planned(model, check_mode)
        assert (result["planned_by"], result["pending"], result["fits"]) == ("guess", True, True)
        assert result["warnings_found"][0].endswith(
            "It will be planned by vLLM itself once the image is there: the image vllm/vllm-openai:v0.33.0 is not on this host yet."
        )


def test_what_vllm_does_not_build_fails_closed(docker: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    docker(says=said(on1={"error": "ValueError: some_words are not known"}))
    model = unknown(tmp_path / "plamo", **json.loads((DATA / "models" / "llama-3.1-8b.json").read_text()) | {"architectures": ["Plamo3ForCausalLM"]})
    with pytest.raises(PlanError) as error:
        planned(model)
    assert str(error.value) == (
        "no formula is known for the caches of Plamo3ForCausalLM, so what it needs cannot be told. vLLM itself does not build the model: "
        "ValueError: some_words are not known. vllm_plan_unknown: serve serves it all the same."
    )
    assert planned(model, unknown="serve")["planned_by"] == "guess"
    assert planned(model, check_mode=True)["planned_by"] == "guess"


def test_gpus_that_cannot_share_the_model(docker: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    docker(says=said(on1={}, on2={"error": "AssertionError: 3 is not divisible by 2"}))
    result = planned(unknown(tmp_path / "plamo"), gpus=[H100] * 2, tensor_parallel_size=2)
    assert (result["fits"], result["reason"]) == (False, "vLLM does not share the model among 2 GPUs: AssertionError: 3 is not divisible by 2.")
    assert result["layers"] == []


def test_a_survey_asks_for_all_numbers_of_gpus(docker: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    docker(says=said(on1={}, on2={"layers": [WHOLE | {"bytes": 262_144}]}))
    rows = {(row["gpus"], row["gb"]): row for row in planned(unknown(tmp_path / "plamo"), survey=True, gpus=[])["survey"]}
    assert docker()[1]["arguments"][-4:] == ["1", "2", "4", "8"]
    assert (rows[1, 80]["fits"], rows[2, 80]["fits"], rows[4, 80]["fits"]) == (True, True, False)


def test_a_known_architecture_is_not_asked_for(docker: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    result = planned(unknown(tmp_path / "llama", **json.loads((DATA / "models" / "llama-3.1-8b.json").read_text())))
    assert (result["planned_by"], docker()) == ("formula", [])


@pytest.mark.long
@pytest.mark.skipif(not (ROOT / ".cache/vllm-venv/bin/python").exists(), reason="make record-plans makes the environment")
def test_the_program_with_the_real_vllm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((DATA / "models" / "qwen3-next-80b.json").read_text())
    command = [str(ROOT / ".cache/vllm-venv/bin/python"), "-", str(tmp_path), "1", "4"]
    result = subprocess.run(command, input=PROGRAM.read_text(), capture_output=True, text=True, check=True, timeout=900)
    answer = asking.read_answer(result.stdout)
    shape = plan_of.read_shape(json.loads((tmp_path / "config.json").read_text()))
    for gpus in (1, 4):
        assert sorted(map(repr, answer.caches(gpus, 2))) == sorted(map(repr, shape.caches(Cache(gpus))))
    assert answer.parameters.total == pytest.approx(shape.parameters, rel=0.01)
