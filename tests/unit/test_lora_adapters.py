"""LoRA adapters beside a model: which vLLM takes, what they need, and how the server, the fetch and the plan get them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _lora_adapters, _model_files
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._lora_adapters import Adapter
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._model_files import ModelError
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_config import PlanError
from ansible_collections.selfhosted.agent_stack.plugins.modules import vllm_plan
from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils import _vllm_service
from test_vllm_plan_module import model, plan_parameters
from test_vllm_service import ROLE, settings_of, topology_of

LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "base_model_name_or_path": "meta-llama/Llama-3.1-8B-Instruct", "bias": "none"}
FILES = ["adapter_config.json", "adapter_model.safetensors"]
SQL = Adapter("sql", "someone/llama-sql")


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ([], []),
        ([{"name": "sql", "source": "someone/llama-sql"}], [SQL]),
        ([{"name": "a", "source": "/srv/a", "revision": "v1"}, {"name": "b", "source": "x/y"}], [Adapter("a", "/srv/a", "v1"), Adapter("b", "x/y")]),
    ],
)
def test_adapters_are_read(entries: Any, found: list[Adapter]) -> None:
    assert _lora_adapters.read_adapters(entries) == found


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("sql", "vllm_lora_adapters is 'sql'; allowed is a list of objects with name, source and"),
        ([7], "vllm_lora_adapters has 7; allowed is a list of objects"),
        ([{"name": "a"}], "allowed is a list of objects"),
        ([{"name": "a", "source": ""}], "allowed is a list of objects"),
        ([{"name": "a", "source": "x/y", "path": "z"}], "allowed is a list of objects"),
        ([{"name": "a", "source": None}], "allowed is a list of objects"),
        ([{"name": "a b", "source": "x/y"}], "has the name 'a b'; allowed are up to 64 letters"),
        ([{"name": "a", "source": "x/y"}, {"name": "a", "source": "x/z"}], "has the name 'a' twice; allowed is a name of its own for each."),
    ],
)
def test_adapters_that_are_none(entries: Any, said: str) -> None:
    with pytest.raises(PlanError) as error:
        _lora_adapters.read_adapters(entries)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("change", "rank"),
    [({}, 16), ({"r": 1}, 1), ({"rank_pattern": {"q_proj": 64}}, 64), ({"modules_to_save": []}, 16), ({"bias": None, "use_dora": False}, 16)],
)
def test_the_rank(change: dict[str, Any], rank: int) -> None:
    assert _lora_adapters.rank_of(SQL, LORA | change, FILES) == rank


@pytest.mark.parametrize(
    ("change", "files", "said"),
    [
        ({"peft_type": "IA3"}, FILES, "is of the type 'IA3'; vLLM serves LoRA."),
        ({"peft_type": None}, FILES, "is of the type None; vLLM serves LoRA."),
        ({"use_dora": True}, FILES, "uses DoRA, which vLLM does not serve."),
        ({"bias": "all"}, FILES, "has biases, which vLLM does not serve."),
        ({"lora_bias": True}, FILES, "has biases, which vLLM does not serve."),
        ({"modules_to_save": ["lm_head"]}, FILES, "replaces whole modules (modules_to_save), which vLLM does not serve."),
        ({}, ["adapter_config.json"], "has no weights; one of adapter_model.safetensors, adapter_model.bin, adapter_model.pt is needed."),
        ({"r": 1024}, FILES, "has the rank 1024; allowed is 1 to 512."),
        ({"r": "16"}, FILES, "has the rank '16'; allowed is 1 to 512."),
        ({"r": None}, FILES, "has the rank None; allowed is 1 to 512."),
        ({"r": True}, FILES, "has the rank True; allowed is 1 to 512."),
        ({"rank_pattern": {"q_proj": 0}}, FILES, "has the rank 0; allowed is 1 to 512."),
        ({"rank_pattern": [8]}, FILES, "has the rank"),
    ],
)
def test_adapters_that_vllm_does_not_take(change: dict[str, Any], files: list[str], said: str) -> None:
    with pytest.raises(PlanError) as error:
        _lora_adapters.rank_of(SQL, LORA | change, files)
    assert str(error.value).startswith(f"the adapter sql (someone/llama-sql) {said}")


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        ([], []),
        ([16], ["--enable-lora", "--max-loras", "1", "--max-lora-rank", "16"]),
        ([4, 20], ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "32"]),
        ([300], ["--enable-lora", "--max-loras", "1", "--max-lora-rank", "320"]),
    ],
)
def test_the_arguments_allow_the_largest_rank(ranks: list[int], arguments: list[str]) -> None:
    assert _lora_adapters.arguments_of(ranks) == arguments


@pytest.mark.parametrize(
    ("base", "model_id", "strange"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", False),
        ("meta-llama/Llama-3.1-8B-Instruct", "RedHatAI/Llama-3.1-8B-Instruct-FP8", False),
        ("/home/someone/model", "Qwen/Qwen3-8B", False),
        ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B", True),
    ],
)
def test_an_adapter_of_another_model_is_told(base: str, model_id: str, strange: bool) -> None:
    said = _lora_adapters.strange_base(SQL, LORA | {"base_model_name_or_path": base}, model_id)
    assert said == (f"The adapter sql was made for {base}, and the model is {model_id}; vLLM does not load it if their layers differ." if strange else "")


def adapter(directory: Path, **change: Any) -> str:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(LORA | change))
    (directory / "adapter_model.safetensors").write_bytes(b"")
    return str(directory)


def test_an_adapter_is_planned(tmp_path: Path) -> None:
    path = model(tmp_path / "Llama-3.1-8B-Instruct", "llama-3.1-8b")
    plain = vllm_plan.make_result(plan_parameters(path, max_model_len=8192))
    entries = [{"name": "sql", "source": adapter(tmp_path / "sql", r=64)}, {"name": "law", "source": adapter(tmp_path / "law", r=8)}]
    planned = vllm_plan.make_result(plan_parameters(path, max_model_len=8192, lora_adapters=entries))
    assert planned["model_arguments"][:5] == ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "64"]
    # Two of rank 64: 81,920 numbers in each of 32 layers, and the logits (tests/unit/test_vllm_plan_module.py), in 16 bits.
    assert planned["overhead_mib"] - plain["overhead_mib"] == pytest.approx(2 * 64 * 2 * (32 * 81920 + 132352) / 2**20, abs=1)
    with pytest.raises(PlanError, match=r"the adapter dora .* uses DoRA"):
        vllm_plan.make_result(plan_parameters(path, lora_adapters=[{"name": "dora", "source": adapter(tmp_path / "dora", use_dora=True)}]))
    with pytest.raises(ModelError, match=r"/nowhere has no adapter_config\.json, so there is no adapter"):
        vllm_plan.make_result(plan_parameters(path, lora_adapters=[{"name": "no", "source": "/nowhere"}]))


def test_an_adapter_that_was_fetched_and_one_of_the_hub(tmp_path: Path) -> None:
    adapter(tmp_path / "someone--llama-sql--main")
    assert _model_files.find_adapter("someone/llama-sql", "", [tmp_path], None).missing_bytes == 0

    def get(path: str, model: str, revision: str, part: tuple[int, int] | None = None) -> bytes:
        if path.startswith("/api/"):
            return json.dumps({"siblings": [{"rfilename": name, "size": 100} for name in (FILES if model == "a/b" else ["README.md"])]}).encode()
        return json.dumps(LORA).encode()

    hub = _model_files.Hub("http://hub", "", 1)
    hub.get = get
    found = _model_files.find_adapter("a/b", "v1", [tmp_path], hub)
    assert (found.described, found.names, found.missing_bytes) == (LORA, tuple(FILES), 200)
    with pytest.raises(ModelError, match=r"c/d has no adapter_config\.json on the hub, so it is no adapter"):
        _model_files.find_adapter("c/d", "", [], hub)
    with pytest.raises(ModelError, match="c/d is in none of the directories given, and the hub is not to be asked"):
        _model_files.find_adapter("c/d", "", [tmp_path], None)


ADAPTERS = [{"name": "sql", "source": "someone/llama-sql", "revision": "v1"}, {"name": "Law", "source": "/srv/adapters/law"}]


@pytest.mark.parametrize(
    ("plan", "enabled"), [({"model_arguments": ["--enable-lora"]}, 1), ({}, 1)], ids=["what the plan says", "without a plan vLLM's own rank"]
)
def test_the_server_gets_them(plan: dict[str, Any], enabled: int) -> None:
    settings = settings_of({"vllm_model": "Qwen/Qwen3-8B", "vllm_lora_adapters": ADAPTERS, "vllm_hf_token": "secret"}, "image")
    service = _vllm_service.describe(settings, topology_of("cuda-planned"), plan)
    command = service["definition"]["command"]
    assert command.count("--enable-lora") == enabled
    place = command.index("--lora-modules")
    assert command[place + 1 : place + 3] == ["sql=/adapters/sql", "Law=/adapters/Law"]
    assert command[place + 3].startswith("--")
    volumes = service["definition"]["volumes"]
    assert "/var/lib/agent-stack/models/someone--llama-sql--v1:/adapters/sql:ro" in volumes
    assert "/srv/adapters/law:/adapters/Law:ro" in volumes
    assert service["more_fetches"] == {
        "fetch-adapter-sql": [
            *("python3", "/etc/agent-stack/fetch_model.py", "--to", "/models/someone--llama-sql--v1", "--hub", "someone/llama-sql"),
            *("--revision", "v1", "--token-file", "/run/secrets/hf_token"),
        ]
    }


def test_without_adapters_the_server_is_as_it_was() -> None:
    service = _vllm_service.describe(settings_of({"vllm_model": "Qwen/Qwen3-8B"}, "image"), topology_of("cuda-planned"), {})
    assert service["more_fetches"] == {}
    assert "--lora-modules" not in service["definition"]["command"]


def test_each_is_fetched_by_a_service_of_its_own() -> None:
    settings = settings_of({"vllm_model": "Qwen/Qwen3-8B", "vllm_lora_adapters": ADAPTERS}, "image")
    service = _vllm_service.describe(settings, topology_of("cuda-planned"), {})
    loader = jinja2.FileSystemLoader(ROLE.parent / "agent_stack" / "templates")
    environment = jinja2.Environment(loader=loader, trim_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False)  # noqa: S701  as Ansible's
    environment.filters |= {"to_json": json.dumps, "combine": lambda first, second: {**first, **second}}
    template = environment.from_string((ROLE / "templates" / "fetch.yml.j2").read_text())
    values = {"__vllm_image_reference": "image", "__vllm_uid": 10001, "__vllm_dir": "/opt/vllm", "agent_stack_data_dir": "/data"}
    services = yaml.safe_load("services:\n" + template.render(__vllm_service=service, **values))["services"]
    assert {name: entry["entrypoint"] for name, entry in services.items()} == {"fetch": service["fetch"], **service["more_fetches"]}
    assert {json.dumps({key: value for key, value in entry.items() if key != "entrypoint"}) for entry in services.values()} == {
        json.dumps({key: value for key, value in services["fetch"].items() if key != "entrypoint"})
    }
    assert services["fetch"]["profiles"] == ["prepare"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"vllm_lora_adapters": [{"name": "a b", "source": "x/y"}]}, 'vllm_lora_adapters has {"name": "a b", "source": "x/y"}; allowed is a name of its own'),
    ({"vllm_lora_adapters": [{"source": "x/y"}]}, 'vllm_lora_adapters has {"source": "x/y"}; allowed is a name of its own'),
    ({"vllm_lora_adapters": [{"name": "a", "source": "y"}]}, 'vllm_lora_adapters has {"name": "a", "source": "y"}; allowed is a name of its own'),
    ({"vllm_lora_adapters": [{"name": "a", "source": "x/y"}] * 2}, 'vllm_lora_adapters has {"name": "a", "source": "x/y"}; allowed is a name of its own'),
    ({"vllm_lora_adapters": [{"name": "agent-model", "source": "x/y"}]}, 'vllm_lora_adapters has {"name": "agent-model", "source": "x/y"}; allowed is a name'),
    ({"vllm_max_num_seqs": -1}, "vllm_max_num_seqs is -1; allowed is 0 to 65536."),
    ({"vllm_max_num_batched_tokens": 9999999}, "vllm_max_num_batched_tokens is 9999999; allowed is 0 to 1048576."),
    ({"vllm_quantization": "FP 8"}, 'vllm_quantization is "FP 8"; allowed is the name of one of vLLM\'s quantisations, such as fp8, or nothing.'),
]
TAKEN: dict[str, dict[str, Any]] = {"none": {}, "two": {"vllm_lora_adapters": ADAPTERS, "vllm_quantization": "fp8", "vllm_max_num_seqs": 8}}


@pytest.mark.play
def test_the_role_refuses_adapters_that_cannot_be_told_apart(tmp_path: Path) -> None:
    """With one host for each case."""
    hosts = TAKEN | {f"refused-{number}": values for number, (values, _said) in enumerate(REFUSED)}
    shared = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "vllm_model": "Qwen/Qwen3-8B"}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": shared}}))
    roles = [{"ansible.builtin.include_role": {"name": "selfhosted.agent_stack.vllm", "tasks_from": "check"}}]
    (tmp_path / "play.yml").write_text(yaml.safe_dump([{"hosts": "all", "gather_facts": False, "tasks": roles}]))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", "play.yml"]
    environment = os.environ | {"ANSIBLE_CONFIG": str(ROLE.parent.parent / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    output = " ".join((result.stdout + result.stderr).split())
    recap = output[output.index("PLAY RECAP") :]
    failed = {name for name in hosts if " failed=1 " in recap[recap.index(f"{name} : ") :].partition("ignored=")[0]}
    assert failed == set(hosts) - set(TAKEN), output
    for _values, said in REFUSED:
        assert said in output, output
