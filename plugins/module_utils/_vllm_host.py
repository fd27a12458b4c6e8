# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""What a swap does to a host: Docker, systemd, HAProxy's runtime API and vLLM's HTTP API. PRIVATE to the collection: it may change at any time."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, TextIO
from urllib.error import URLError
from urllib.request import Request

from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_api
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_judge import OPENER, Judge, unix_url
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_swap import HOLD, SLOTS, State, SwapError, Traffic, unused_caches

NETWORK = "agent-stack-model"
PORT = 8000
# The program that waits for the GPU where the swap says so, and the directory where it is told, both inside the container.
SERVE, GATE = "/etc/agent-stack/serve.py", "/run/agent-stack"
# What stays free of the host's memory when weights are pinned, and how long that may take.
KEPT_FREE_MIB = 4096
PIN_SECONDS = 300
# A server of HAProxy's takes no new requests with any of these set: maintenance by command, inherited, for want of an address, or by host name.
OUT_OF_SERVICE = 0x01 | 0x02 | 0x20 | 0x40
# (EngineCore_DP0 pid=215) ERROR 11-27 12:00:01 [core.py:866] EngineCore failed to start.
ERROR_LINE = re.compile(r"^(?:\((?P<process>\S+) pid=\d+\) )?ERROR \d\d-\d\d \d\d:\d\d:\d\d \[?(?P<place>\S+?)\] ?(?P<said>.*)$")
SERVER_LINE = re.compile(r"^(\s*server (\w+) .*?)( disabled)?$", re.MULTILINE)


@dataclass(frozen=True)
class Paths:
    """Where things are on the host. `root` holds a directory for each Compose project, `data` what is kept between runs."""

    root: Path
    data: Path

    @property
    def servers(self) -> Path:
        """The part of the gateway's configuration that names its servers."""
        return self.root / "vllm" / "servers" / "servers.cfg"

    @property
    def gateway(self) -> Path:
        """The rest of the gateway's configuration."""
        return self.root / "vllm" / "config" / "haproxy.cfg"

    @property
    def socket(self) -> Path:
        return self.root / "vllm" / "run" / "haproxy.sock"

    def sockets(self, slot: str) -> Path:
        """Where a slot that shares the host's network has its socket. The gateway sees the directory of both as /run/vllm."""
        return self.root / "vllm" / "sockets" / slot

    @property
    def state(self) -> Path:
        return self.data / "vllm" / "swap.json"

    @property
    def lock(self) -> Path:
        return self.data / "vllm" / "swap.lock"

    @property
    def progress(self) -> Path:
        return self.data / "vllm" / "progress.json"

    def project(self, slot: str) -> Path:
        return self.root / f"vllm-{slot}"


def write(path: Path, text: str, mode: int = 0o640) -> None:
    """Replace a file such that after a power cut it is the old one or the new one."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "w") as stream:
        os.fchmod(stream.fileno(), mode)
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(path)


def read_state(paths: Paths) -> State:
    """Return what the last run wrote down. Raises SwapError for a file that cannot be read."""
    try:
        return State.from_json(paths.state.read_text())
    except FileNotFoundError:
        return State()
    except SwapError as error:
        raise SwapError(f"{paths.state}: {error}") from error


@contextlib.contextmanager
def locked(paths: Paths, what: str, patience: float = 30) -> Iterator[None]:
    """Be the only run. Raises SwapError if another one is under way, with what it does and since when.

    The watchdog holds the same lock for a moment at each look, without a word; that is waited for.
    """
    paths.lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(paths.lock, "a+") as stream:
        deadline = time.monotonic() + patience
        while not lock(stream):
            stream.seek(0)
            owner = stream.read().strip()
            if owner or time.monotonic() > deadline:
                raise SwapError(f"another run is under way on this host, and this one did nothing: {owner or 'the watchdog, which restarts the server'}")
            time.sleep(0.1)
        stream.truncate(0)
        stream.write(f"{what}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n")
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


def lock(stream: TextIO) -> bool:
    """Take the lock that ends with the file. Return whether nobody else has it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Gateway:
    """HAProxy's runtime API, and the file that a restarted HAProxy begins with."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths

    def ask(self, command: str, patience: float = 20) -> str:
        """Return the answer to a command. Raises SwapError if the gateway does not answer in time; it may be just being restarted."""
        deadline = time.monotonic() + patience
        while True:
            try:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.settimeout(10)
                    connection.connect(str(self.paths.socket))
                    connection.sendall(command.encode() + b"\n")
                    answer = b"".join(iter(lambda: connection.recv(65536), b""))
                    return answer.decode()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise SwapError(f"the gateway cannot be asked through {self.paths.socket}: {error}") from error
                time.sleep(0.3)

    def servers(self, patience: float = 20) -> dict[tuple[str, str], tuple[str, bool]]:
        """Return address and whether it takes requests, for each backend and server."""
        lines = self.ask("show servers state", patience).splitlines()
        rows = [line.split() for line in lines if line and line[0].isdigit() and len(line.split()) > 7]
        return {(row[1], row[3]): (row[4], not int(row[6]) & OUT_OF_SERVICE) for row in rows}

    def statistics(self, patience: float = 20) -> dict[str, dict[str, str]]:
        """Return the numbers of the backend `model` and of each of its servers, by name."""
        text = self.ask("show stat model 6 -1", patience).lstrip("# ")
        return {row["svname"]: row for row in csv.DictReader(text.splitlines())}

    def running(self, slot: str, patience: float = 20) -> int:
        """Return how many requests of the slot's are not answered yet."""
        return int(self.statistics(patience).get(slot, {}).get("scur") or 0)

    def route(self, to: str) -> bool:
        """Send new requests to one slot alone, or to none. The new one first. Where they are held is always in service, and taken where nothing else is."""
        now = self.servers()
        wanted = {key: key[1] in (to, HOLD) for key in now if key[0] in ("model", "model_now") and key[1] in (*SLOTS, HOLD)}
        changes = [key for key in sorted(wanted, key=lambda key: not wanted[key]) if now[key][1] != wanted[key]]
        for backend, name in changes:
            answer = self.ask(f"set server {backend}/{name} state {'ready' if wanted[backend, name] else 'maint'}").strip()
            if answer:
                raise SwapError(f"the gateway refused to change {backend}/{name}: {answer}")
        return bool(changes)

    def keep(self, to: str, text: str = "", *, dry: bool = False) -> bool:
        """Have the file name the same; `text` replaces the rest of it. Return whether that is a change, which is not made if `dry`.

        The slot that is in service has no `disabled` at the end of its line there.
        """
        before = self.paths.servers.read_text() if self.paths.servers.exists() else ""
        after = SERVER_LINE.sub(lambda match: match[1] + (" disabled" if match[2] in SLOTS and match[2] != to else ""), text or before)
        if after == before:
            return False
        if not dry:
            write(self.paths.servers, after, 0o644)
        return True

    def kept(self) -> str:
        """Return what the file names: a slot, or that requests are held."""
        text = self.paths.servers.read_text() if self.paths.servers.exists() else ""
        lines = SERVER_LINE.findall(text)
        return str(next((name for _text, name, disabled in lines if name in SLOTS and not disabled), HOLD))


def execute(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with nothing to read, for at most `timeout` seconds. Raises OSError and subprocess.TimeoutExpired."""
    # The watchdog runs this on the host without Ansible, and so without run_command.
    # pylint: disable-next=ansible-bad-function
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL)


def check_gateway(configuration: str, servers: str, paths: Paths, image: str, docker: str = "docker") -> None:
    """Have the HAProxy that will read a configuration check it, in a container without a network. Raises SwapError with what HAProxy says."""
    with tempfile.TemporaryDirectory() as directory:
        # Its user in the image is another one.
        os.chmod(directory, 0o755)  # noqa: S103
        files = {"haproxy.cfg": configuration, "servers.cfg": servers}
        for name, text in files.items():
            write(Path(directory) / name, text, 0o644)
        command = [docker, "run", "--rm", "--pull", "never", "--network", "none", "--add-host", "gateway.inference.internal:127.0.0.1", "--user", "99:99"]
        command += ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "64", "--memory", "256m"]
        command += ["--volume", f"{directory}:/check:ro"]
        command += ["--volume", f"{paths.root / 'vllm' / 'config'}:/etc/agent-stack:ro", "--entrypoint", "haproxy", image, "-c"]
        command += [argument for name in files for argument in ("-f", f"/check/{name}")]
        try:
            result = execute(command, 60)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SwapError(f"the gateway's new configuration could not be checked, and nothing was changed: {error}") from error
    if result.returncode != 0:
        said = (result.stderr or result.stdout).strip()
        raise SwapError(f"the gateway's new configuration is not valid, and nothing was changed: {said}")


class DockerHost:
    """`_vllm_swap.Host` on a real host."""

    def __init__(self, paths: Paths, served_name: str = "", judging: dict[str, Any] | None = None, docker: str = "docker", *, gpu: bool = False) -> None:
        self.paths = paths
        self.served_name = served_name
        self.judging = judging or {}
        self.docker = docker
        self.gpu = gpu
        self.gateway = Gateway(paths)

    # ------------------------------------------------------------------------------------------------------------------- programs

    def run(self, *command: str, timeout: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        try:
            result = execute(command, timeout)
        except subprocess.TimeoutExpired:
            raise SwapError(f"`{' '.join(command[:5])}` took more than {timeout:g} seconds") from None
        except OSError as error:
            raise SwapError(f"`{command[0]}` cannot be run: {error.strerror}") from error
        if check and result.returncode != 0:
            raise SwapError(f"`{' '.join(command[:8])}` ended with {result.returncode}: {(result.stderr or result.stdout).strip()[-2000:]}")
        return result

    def compose(self, slot: str, *arguments: str, timeout: float = 300) -> None:
        self.run(self.docker, "compose", "--file", str(self.paths.project(slot) / "compose.yml"), *arguments, timeout=timeout)

    def inspect(self, slot: str) -> dict[str, Any]:
        """Return what Docker knows of the slot's container, or nothing."""
        if shutil.which(self.docker) is None:
            return {}
        result = self.run(self.docker, "container", "inspect", container(slot), check=False)
        return dict(json.loads(result.stdout)[0]) if result.returncode == 0 else {}

    def address(self, slot: str) -> str:
        """Return the slot's address on the model's network, or nothing."""
        return address_of(self.inspect(slot))

    def url(self, slot: str) -> str:
        found = self.inspect(slot)
        if on_host_network(found):
            return str(unix_url(str(self.paths.sockets(slot) / "api.sock")))
        address = address_of(found)
        if not address:
            raise URLError(f"{container(slot)} has no address")
        return f"http://{address}:{PORT}"

    def http(self, slot: str, path: str, *, post: bytes | None = None, timeout: float = 5) -> bytes:
        """Raises OSError for anything but a 2xx answer."""
        request = Request(f"{self.url(slot)}{path}", data=post)
        try:
            with OPENER.open(request, timeout=timeout) as response:
                return bytes(response.read())
        except HTTPException as error:
            raise URLError(f"{path} was answered with something else than HTTP: {error!r}") from error

    # ----------------------------------------------------------------------------------------------------------------------- Host

    def now(self) -> float:
        return time.time()

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def save(self, state: State) -> None:
        write(self.paths.state, state.to_json())

    def status(self, slot: str) -> str:
        state = self.inspect(slot).get("State")
        if state is None:
            return "stopped" if (self.paths.project(slot) / "compose.yml").exists() else "absent"
        return "running" if state["Running"] else "stopped"

    def born(self, slot: str) -> str:
        # The id alone stays the same when Docker starts a container again.
        found = self.inspect(slot)
        return f"{found['Id'][:12]} {found['State']['StartedAt']}" if found else ""

    def check(self) -> None:
        if not self.gpu:
            return
        found = self.run("nvidia-smi", "-L", timeout=30, check=False)
        if found.returncode != 0:
            said = (found.stdout + found.stderr).strip()
            raise SwapError(f"the host's GPU is away, and no model can be started: nvidia-smi ended with {found.returncode}: {said}")

    def create(self, slot: str, definition: dict[str, Any]) -> None:
        project: dict[str, Any] = {"name": f"agent-stack-vllm-{slot}"}
        if definition.get("network_mode") == "host":
            project["services"] = {"server": definition | {"volumes": [*definition["volumes"], f"{self.paths.sockets(slot)}:/run/vllm"]}}
        else:
            project["services"] = {"server": definition | {"networks": {"model": {"aliases": [f"{slot}.model.internal"]}}}}
            project["networks"] = {"model": {"name": NETWORK, "external": True}}
        directory = self.paths.project(slot)
        directory.mkdir(mode=0o755, exist_ok=True)
        if SERVE in definition.get("entrypoint", []):
            gate = directory / "gate"
            gate.mkdir(mode=0o700, exist_ok=True)
            os.chown(gate, *map(int, definition["user"].split(":")))
            server = project["services"]["server"]
            server["volumes"] = [*definition["volumes"], f"{gate}:{GATE}"]
        self._stand_by(slot, True)
        # JSON is YAML, and needs no library on the host. Compose would take a dollar sign for a variable.
        text = json.dumps(project, indent=2).replace("$", "$$")
        write(directory / "compose.yml", f"# Written by the swap of models. What serves is changed with `--tags vllm`.\n{text}\n")
        self._create_container(slot)

    def _create_container(self, slot: str) -> None:
        self.compose(slot, "create", "--no-build", "--pull", "never")
        self.run(self.docker, "update", "--restart=no", container(slot))

    def start(self, slot: str) -> None:
        self._wait_mark(slot).unlink(missing_ok=True)
        self._start(slot)

    def _start(self, slot: str) -> None:
        if not self.inspect(slot):
            self._create_container(slot)
        self.compose(slot, "start")

    def start_ahead(self, slot: str) -> bool:
        gate = self._wait_mark(slot).parent
        if not gate.is_dir():
            return False
        (gate / "imported").unlink(missing_ok=True)
        self._wait_mark(slot).touch()
        self._start(slot)
        return True

    def waits(self, slot: str) -> bool:
        return self._wait_mark(slot).exists()

    def imported(self, slot: str) -> bool:
        return (self._wait_mark(slot).parent / "imported").exists()

    def _wait_mark(self, slot: str) -> Path:
        return self.paths.project(slot) / "gate" / "wait"

    def stop(self, slot: str, *, at_once: bool) -> None:
        if self.status(slot) != "running":
            return
        self.run(self.docker, "update", "--restart=no", container(slot))
        if at_once:
            self.run(self.docker, "kill", container(slot), check=False)
        else:
            self.compose(slot, "stop")
        deadline = self.now() + 30
        while self.status(slot) == "running":
            if self.now() > deadline:
                raise SwapError(f"{container(slot)} does not stop")
            self.pause(0.1)

    def remove(self, slot: str) -> None:
        if (self.paths.project(slot) / "compose.yml").exists():
            self.stop(slot, at_once=True)
            self.run("systemctl", "stop", unit(slot), check=False)
            self.compose(slot, "down")
        elif self.status(slot) != "absent":
            self.run(self.docker, "container", "rm", "--force", container(slot))
        shutil.rmtree(self.paths.project(slot), ignore_errors=True)

    def log(self, slot: str) -> str:
        # Only of its last start: an earlier one may have ended for another reason.
        started = str(self.inspect(slot).get("State", {}).get("StartedAt") or "0")
        result = self.run(self.docker, "logs", "--tail", "4000", "--since", started, container(slot), check=False)
        return last_words(result.stdout + result.stderr)

    def remove_unused_caches(self, state: State) -> None:
        """What is compiled for an image is kept as long as a slot uses the image. What cannot be removed is left."""
        found = [str(path) for path in sorted((self.paths.data / "vllm-cache").glob("*"))]
        for path in unused_caches(found, state.slots.values()):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def ready(self, slot: str) -> bool:
        try:
            self.http(slot, "/health")
        except OSError:
            return False
        return True

    def asleep(self, slot: str) -> bool:
        """A server without sleep mode does not know the question."""
        try:
            return bool(json.loads(self.http(slot, "/is_sleeping"))["is_sleeping"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def sleep(self, slot: str) -> None:
        self._order(slot, "/sleep?level=1", "fall asleep")

    def pin(self, slot: str, weights_mib: int) -> bool:
        """A server that was started without `pin_weights` refuses. It pins in the background, and serves meanwhile."""
        # torch's allocator rounds each piece up to a power of two.
        if not weights_mib or free_mib() < 2 * weights_mib + KEPT_FREE_MIB:
            return False
        deadline = self.now() + PIN_SECONDS
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            while self.now() < deadline:
                workers = json.loads(self.http(slot, "/collective_rpc", post=b'{"method": "pin_weights"}', timeout=30))["results"]
                if all(worker["done"] for worker in workers):
                    return bool(workers) and not any(worker["error"] for worker in workers)
                self.pause(0.5)
        return False

    def wake(self, slot: str) -> None:
        self._order(slot, "/wake_up", "wake up")

    def _order(self, slot: str, path: str, what: str) -> None:
        try:
            self.http(slot, path, post=b"", timeout=300)
        except OSError as error:
            raise SwapError(f"{container(slot)} does not {what}: {error}.\n{self.log(slot)}") from error

    def busy(self, slot: str) -> int:
        """Both are asked: the gateway knows streams that the engine has ended, the engine those that the gateway lost with a restart."""
        try:
            in_engine = _vllm_api.progress(self.http(slot, "/metrics")).running
        except (OSError, _vllm_api.ApiError):
            in_engine = 0
        return max(self.gateway.running(slot), int(in_engine))

    def judge(self, slot: str, *, briefly: bool) -> list[str]:
        try:
            url = self.url(slot)
        except URLError as error:
            return [str(error.reason)]
        params = {
            "url": url,
            "model": self.served_name,
            "max_tokens": 4,
            "generate": True,
            "tool_prompt": "",
            "tool_max_tokens": 1024,
            "progress_seconds": 5,
            "metrics_url": f"{url}/metrics",
            **self.judging,
        }
        if briefly:
            params |= {"tool_call": False, "golden_prompts": []}
        return list(Judge(params).judge()["reasons"])

    def route(self, to: str) -> bool:
        if to != HOLD:
            self._wait_for_address(to)
        return self.gateway.route(to)

    def _wait_for_address(self, slot: str) -> None:
        """HAProxy asks for names once a second. Until it knows the new address it would send requests to the old one."""
        if on_host_network(self.inspect(slot)):
            return
        deadline = self.now() + 30
        while True:
            address = self.address(slot)
            known = self.gateway.servers().get(("model", slot), ("", False))[0]
            if address and address == known:
                return
            if self.now() > deadline:
                raise SwapError(f"the gateway takes the server of {slot} for {known}, and its address is {address}")
            self.pause(0.2)

    def keep_route(self, slot: str) -> bool:
        return self.gateway.keep(slot)

    def promote(self, slot: str) -> bool:
        changed = self._restart_policy(slot, "unless-stopped")
        changed = self._stand_by(slot, False) or changed
        if self.run("systemctl", "is-active", unit(slot), check=False).stdout.strip() not in ("active", "activating"):
            # It only finds what runs already. Nobody waits for it to see that.
            self.run("systemctl", "start", "--no-block", unit(slot))
            changed = True
        return changed

    def demote(self, slot: str) -> bool:
        changed = self._stand_by(slot, True)
        return self._restart_policy(slot, "no") or changed

    def _stand_by(self, slot: str, wanted: bool) -> bool:
        """The mark keeps the slot's unit from starting it, on boot and with the target, which wants both slots.

        Enabling and disabling units instead would need reloads of systemd, and those can cost running containers their GPU.
        """
        mark = self.paths.project(slot) / "standby"
        if not self.paths.project(slot).is_dir() or mark.exists() == wanted:
            return False
        if wanted:
            mark.touch()
        else:
            mark.unlink()
        return True

    def _restart_policy(self, slot: str, policy: str) -> bool:
        found = self.inspect(slot)
        if not found or found["HostConfig"]["RestartPolicy"]["Name"] == policy:
            return False
        self.run(self.docker, "update", f"--restart={policy}", container(slot))
        return True

    def traffic(self) -> Traffic:
        """A gateway that does not answer holds nothing."""
        try:
            rows = self.gateway.statistics(patience=0)
        except SwapError:
            return Traffic(0, 0)
        whole = rows.get("BACKEND", {})
        served = sum(int(row.get("scur") or 0) for name, row in rows.items() if name not in ("BACKEND", HOLD))
        return Traffic(max(0, int(whole.get("scur") or 0) - served), int(whole.get("hrsp_5xx") or 0))


def last_words(log: str) -> str:
    """Return the first error that the engine says, or the last lines if it says none, with a heading.

    The API server's traceback, which comes last, only says that the cause stands above it. Of a long traceback the middle is left out.
    """
    found = [(line, match) for line in log.strip().splitlines() if (match := ERROR_LINE.match(line))]
    of_engine = [(line, match) for line, match in found if match["process"] and not match["process"].startswith("APIServer")] or found
    if not of_engine:
        return "\n".join(["Its last log lines:", *log.strip().splitlines()[-40:]])
    first = of_engine[0][1]
    same = [match["said"] for _position, match in of_engine if (match["process"], match["place"]) == (first["process"], first["place"])]
    lines = same if len(same) <= 20 else [*same[:4], "...", *same[-15:]]
    return "\n".join([f"The first error in its log ({' '.join(filter(None, (first['process'], first['place'])))}):", *lines])


def free_mib() -> int:
    """Return what programs can still have of the host's memory."""
    with open("/proc/meminfo") as lines:
        return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def address_of(found: dict[str, Any]) -> str:
    return str(found.get("NetworkSettings", {}).get("Networks", {}).get(NETWORK, {}).get("IPAddress") or "")


def on_host_network(found: dict[str, Any]) -> bool:
    """A model that several hosts share is on the network of each, and listens for requests on a socket that only the gateway reaches."""
    return bool(found.get("HostConfig", {}).get("NetworkMode") == "host")


def container(slot: str) -> str:
    return f"agent-stack-vllm-{slot}-server-1"


def unit(slot: str) -> str:
    return f"agent-stack@vllm-{slot}.service"
