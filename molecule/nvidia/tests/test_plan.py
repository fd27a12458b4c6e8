"""A wish that cannot come true is refused in one sentence, with a model that serves on the GPU and is not touched."""

from __future__ import annotations

import json

import pytest
from test_nvidia import DRIVER, ROOT, on_host, play, processes

SHAPES = ROOT / "tests" / "unit" / "data" / "models"


def put_model(name: str, shape: str, index: str = "") -> None:
    """Write a directory with the config of a real model, and perhaps an index of its files."""
    on_host("mkdir", "--parents", f"/srv/models/{name}")
    on_host("sh", "-c", f"cat > /srv/models/{name}/config.json", stdin=(SHAPES / f"{shape}.json").read_text())
    if index:
        on_host("sh", "-c", f"cat > /srv/models/{name}/model.safetensors.index.json", stdin=index)


@pytest.mark.parametrize(
    ("name", "shape", "variables", "said"),
    [
        ("Llama-3.1-70B", "llama-3.1-70b", {}, "does not fit: the weights take 131.4 GiB and the engine"),
        ("Qwen2.5-7B", "qwen2.5-7b", {"vllm_max_model_len": 40000}, "a context of 40,000 tokens was asked for, and the model has at most 32,768"),
        ("Qwen2.5-7B", "qwen2.5-7b", {"vllm_tool_call_parser": "hermit"}, "the pinned vLLM has no tool call parser hermit, for example hermes."),
        ("Qwen2.5-7B-broken", "qwen2.5-7b", {"index": "{"}, "the safetensors index of /srv/models/Qwen2.5-7B-broken is not JSON."),
    ],
)
def test_it_is_refused_and_nothing_is_touched(name: str, shape: str, variables: dict[str, object], said: str) -> None:
    variables = dict(variables)
    on_host("sh", "-c", "cat > /var/lib/fake-nvidia/driver", stdin="".join(f"{key}={value}\n" for key, value in DRIVER.items()))
    put_model(name, shape, str(variables.pop("index", "")))
    before = processes()
    done = play(tags="vllm", vllm_model=f"/srv/models/{name}", **{"vllm_tool_call_parser": "auto", **variables})
    assert done.returncode == 2, done.output
    assert said in done.words, done.output
    assert done.changed == 0
    assert processes() == before
    assert json.loads(on_host("cat", "/var/lib/agent-stack/vllm/swap.json"))["slots"]["blue"]["condition"] == "serving"


def test_a_model_that_fits_is_served_with_its_parser() -> None:
    """The plan's parser reaches the server, and judging asks for a tool call because of it."""
    put_model("Qwen2.5-7B-Instruct", "qwen2.5-7b")
    done = play(tags="vllm", vllm_model="/srv/models/Qwen2.5-7B-Instruct", vllm_tool_call_parser="auto")
    assert done.returncode == 0, done.output
    state = json.loads(on_host("cat", "/var/lib/agent-stack/vllm/swap.json"))
    active = state["active"]
    assert state["slots"][active]["model"] == "/srv/models/Qwen2.5-7B-Instruct"
    # The driver pretends that 79 GiB are free, whatever runs: both fit beside each other.
    assert state["strategy"] == "side_by_side"
    command = json.loads(on_host("docker", "inspect", "--format", "{{json .Config.Cmd}}", f"agent-stack-vllm-{active}-server-1"))
    assert command[command.index("--tool-call-parser") + 1] == "hermes"
