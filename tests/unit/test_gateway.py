"""The gateway's configuration in a real HAProxy: requests are held, sent elsewhere and answered, and not one is lost on the way."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_host
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_swap import SwapError
from ansible_collections.selfhosted.agent_stack.plugins.modules import vllm_swap
from programs import load

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "roles" / "vllm" / "templates"


model_server = load("tests/model_server/server.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


ALONE = {"serves": True, "is_peer": False, "peers": [], "shared": False}


def render(name: str, topology: dict[str, Any] | None = None, **values: Any) -> str:
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)  # noqa: S701  no HTML
    environment.filters["comment"] = lambda text: f"# {text}"
    return environment.from_string((TEMPLATES / name).read_text()).render(ansible_managed="managed", __vllm_topology=ALONE | (topology or {}), **values)


class Stack:
    """HAProxy with the role's configuration, on loopback, and two slots of which any may run or not."""

    def __init__(self, directory: Path, topology: dict[str, Any] | None = None, **values: Any) -> None:
        self.paths = _vllm_host.Paths(directory, directory / "data")
        self.ports = {slot: free_port() for slot in ("blue", "green")}
        self.port, metrics, own = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        for path in (self.paths.servers, self.paths.socket):
            path.parent.mkdir(parents=True)
        self.front_port, self.metrics_port = free_port(), metrics
        config = render("haproxy.cfg.j2", topology, vllm_served_name="agent-model", vllm_hold_seconds=20, **values)
        config = config.replace("bind :8443", f"bind 127.0.0.1:{self.front_port}").replace("/etc/agent-stack/peers", str(directory / "peers"))
        config = config.replace("gateway.inference.internal:8000", f"127.0.0.1:{self.port}").replace("/run/agent-stack/haproxy.sock", str(self.paths.socket))
        config = config.replace("bind :8001", f"bind 127.0.0.1:{metrics}").replace("bind :8405", f"bind 127.0.0.1:{own}")
        (directory / "haproxy.cfg").write_text(config)
        servers = render("servers.cfg.j2", topology, **values).replace("/etc/agent-stack/peers", str(directory / "peers"))
        # Names are Docker's affair; here the slots are ports.
        servers = re.sub(
            r"agent-stack-vllm-(blue|green)-server-1:8000 resolvers docker resolve-prefer ipv4 init-addr \S+",
            lambda match: f"127.0.0.1:{self.ports[match[1]]}",
            servers,
        )
        self.paths.servers.write_text(servers.replace("/run/vllm", str(self.paths.sockets("").resolve())))
        self.command = ["haproxy", "-db", "-f", str(directory / "haproxy.cfg"), "-f", str(self.paths.servers)]
        self.process: subprocess.Popen[bytes] | None = None
        self.models: dict[str, Any] = {}
        self.gateway = _vllm_host.Gateway(self.paths)

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.gateway.servers()

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        self.stop()
        for slot in list(self.models):
            self.close_model(slot)

    def model(self, slot: str, name: str = "") -> None:
        server = model_server.ModelServer(("127.0.0.1", self.ports[slot]), ["agent-model"], model=name or slot)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.models[slot] = server

    def close_model(self, slot: str) -> None:
        server = self.models.pop(slot)
        server.shutdown()
        server.server_close()

    def ask(self, text: str = "hello", **more: Any) -> str:
        """Return the name of the model that answered. Raises URLError."""
        body = {"model": "agent-model", "messages": [{"role": "user", "content": text}], **more}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = response.read()
        if more.get("stream"):
            assert answer.endswith(b"data: [DONE]\n\n")
            return str(json.loads(answer.splitlines()[0].removeprefix(b"data:"))["system_fingerprint"])
        return str(json.loads(answer)["system_fingerprint"])


@contextlib.contextmanager
def directory_for_haproxy() -> Iterator[Path]:
    """HAProxy is on the path meanwhile."""
    if shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.fail("haproxy is not installed; tests/packages.sh does that")
    # The path of a socket has 108 characters at most.
    with tempfile.TemporaryDirectory(prefix="gw") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
        yield Path(directory)


@pytest.fixture
def stack() -> Iterator[Stack]:
    with directory_for_haproxy() as directory, contextlib.closing(Stack(directory)) as stack:
        stack.start()
        yield stack


def test_a_model_that_several_hosts_share_is_reached_through_its_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    with directory_for_haproxy() as directory, contextlib.closing(Stack(directory, {"shared": True})) as stack:
        stack.start()
        host = _vllm_host.DockerHost(stack.paths, "agent-model", {"timeout": 10, "tool_call": True, "golden_prompts": []})
        monkeypatch.setattr(host, "inspect", lambda slot: {"HostConfig": {"NetworkMode": "host"}})
        assert not host.ready("blue")
        assert host.judge("blue", briefly=True)
        with ThreadPoolExecutor(5) as pool:
            stack.gateway.route("blue")
            answers = [pool.submit(stack.ask) for _ in range(5)]
            time.sleep(1.2)
            path = stack.paths.sockets("blue") / "api.sock"
            path.parent.mkdir(parents=True)
            stack.models["blue"] = model_server.UnixModelServer(str(path), ["agent-model"], model="blue")
            threading.Thread(target=stack.models["blue"].serve_forever, daemon=True).start()
            assert [answer.result() for answer in answers] == ["blue"] * 5
        assert host.ready("blue")
        assert host.judge("blue", briefly=False) == []
        # A request is over for its client before it is for the server's count.
        for _ in range(100):
            if host.busy("blue") == 0:
                break
            time.sleep(0.05)
        assert host.busy("blue") == 0
        # There is no address to wait for.
        assert not host.route("blue")
        assert stack.gateway.keep("green")
        assert stack.gateway.kept() == "green"


def test_without_a_model_requests_wait_and_are_answered_by_the_first(stack: Stack) -> None:
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(stack.ask) for _ in range(20)]
        time.sleep(2.2)
        traffic = traffic_of(stack)
        assert traffic.held == 20
        stack.model("green")
        time.sleep(1.2)
        assert not any(answer.done() for answer in answers), "a model that does not serve yet met users"
        assert stack.gateway.route("green")
        assert [answer.result() for answer in answers] == ["green"] * 20
    assert traffic_of(stack).failed == 0
    assert not stack.gateway.route("green")


def traffic_of(stack: Stack) -> Any:
    host = _vllm_host.DockerHost(stack.paths, "agent-model", {})
    return host.traffic()


@pytest.mark.parametrize("hold", [False, True], ids=["side by side", "held"])
def test_flips_under_load_lose_nothing(stack: Stack, hold: bool) -> None:
    for slot in ("blue", "green"):
        stack.model(slot)
    stack.gateway.route("blue")
    stop = threading.Event()
    answers: list[str] = []
    problems: list[str] = []

    def client(stream: bool) -> None:
        while not stop.is_set():
            try:
                answers.append(stack.ask("[[pace 0.02]] a b c d", stream=stream))
            except (OSError, ValueError, AssertionError) as error:
                problems.append(repr(error))

    threads = [threading.Thread(target=client, args=(number % 2 == 0,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for target in ("green", "blue", "green", "blue"):
        time.sleep(0.3)
        if hold:
            stack.gateway.route("hold")
            time.sleep(1.5)
        stack.gateway.route(target)
        time.sleep(1.3 if hold else 0.3)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert set(answers) == {"blue", "green"}
    assert traffic_of(stack).failed == 0


def test_running_requests_are_seen_and_finish_where_they_are(stack: Stack) -> None:
    for slot in ("blue", "green"):
        stack.model(slot)
    stack.gateway.route("blue")
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stack.ask, "[[pace 0.2]] a b c d", stream=True) for _ in range(4)]
        time.sleep(0.3)
        stack.gateway.route("green")
        assert int(stack.gateway.statistics()["blue"]["scur"]) == 4
        assert stack.ask() == "green"
        assert [stream.result() for stream in streams] == ["blue"] * 4
    assert int(stack.gateway.statistics()["blue"]["scur"]) == 0


def test_a_restarted_gateway_goes_on_with_what_was_kept(stack: Stack) -> None:
    for slot in ("blue", "green"):
        stack.model(slot)
    assert stack.gateway.keep("green")
    assert not stack.gateway.keep("green")
    stack.stop()
    stack.start()
    assert stack.ask() == "green"
    assert not stack.gateway.route("green")
    text = stack.paths.servers.read_text()
    stack.gateway.keep("blue")
    stack.gateway.keep("green")
    assert stack.paths.servers.read_text() == text


def test_what_is_kept_is_what_the_role_writes(stack: Stack) -> None:
    for slot in ("blue", "green"):
        stack.gateway.keep(slot)
        assert stack.gateway.kept() == slot
        # Another configuration keeps what serves, and the same one is no change.
        text = f"# {slot}\n" + render("servers.cfg.j2")
        assert stack.gateway.keep(slot, text)
        assert stack.gateway.kept() == slot
        assert stack.paths.servers.read_text().startswith(f"# {slot}\n")
        assert not stack.gateway.keep(slot, text)
        assert not stack.gateway.keep(slot)
    assert stack.gateway.keep("hold", dry=True)
    assert stack.gateway.kept() == "green"
    stack.gateway.keep("hold")
    assert stack.gateway.kept() == "hold"


def test_a_server_that_is_down_makes_requests_wait(stack: Stack) -> None:
    stack.gateway.route("blue")
    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(stack.ask) for _ in range(5)]
        time.sleep(1.5)
        stack.model("blue")
        assert [answer.result() for answer in answers] == ["blue"] * 5


@pytest.mark.parametrize("path", ["/sleep?level=1", "/wake_up", "/v1/completions", "/invocations", "/tokenize", "/is_sleeping", "/metrics", "/docs"])
def test_nothing_else_passes(stack: Stack, path: str) -> None:
    stack.model("blue")
    stack.gateway.route("blue")
    for data in (None, b"{}"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{stack.url}{path}", data, timeout=5)
        assert caught.value.code == 404
    assert stack.models["blue"].state()["requests"] == []


def test_a_gateway_that_is_not_there(tmp_path: Path) -> None:
    gateway = _vllm_host.Gateway(_vllm_host.Paths(tmp_path, tmp_path))
    with pytest.raises(SwapError, match="cannot be asked through"):
        gateway.servers(patience=0.5)


def test_only_one_run_at_a_time(tmp_path: Path) -> None:
    paths = _vllm_host.Paths(tmp_path, tmp_path)
    with (
        _vllm_host.locked(paths, "present a/model"),
        pytest.raises(SwapError, match=r"did nothing: present a/model, process \d+, since 20"),
        _vllm_host.locked(paths, "present another"),
    ):
        pass
    with _vllm_host.locked(paths, "again"):
        pass


def test_the_watchdogs_look_is_waited_for(tmp_path: Path) -> None:
    paths = _vllm_host.Paths(tmp_path, tmp_path)
    paths.lock.parent.mkdir(parents=True)
    with open(paths.lock, "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        threading.Timer(0.5, fcntl.flock, (stream, fcntl.LOCK_UN)).start()
        with _vllm_host.locked(paths, "present a/model"):
            pass
    with open(paths.lock, "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SwapError, match="the watchdog"), _vllm_host.locked(paths, "present a/model", patience=0.3):
            pass


# Stands for Docker: runs HAProxy itself on what the container would see.
DOCKER = """#!/bin/sh
for argument; do
  case "$argument" in
    *:/check:ro) check=${argument%%:*} ;;
    *:/etc/agent-stack:ro) config=${argument%%:*} ;;
  esac
done
sed -i "s,/etc/agent-stack,$config,; s,gateway.inference.internal,127.0.0.1," "$check"/*.cfg
exec haproxy -c -f "$check/haproxy.cfg" -f "$check/servers.cfg"
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", ""),
        ("option httplog", "option httplogg", "parsing .*haproxy.cfg:[0-9]+.*unknown option 'httplogg'"),
        ("default_backend model\n", "default_backend another\n", "unable to find required default_backend: 'another'"),
    ],
)
def test_haproxy_checks_a_new_configuration_before_it_is_written(old: str, new: str, said: str) -> None:
    with directory_for_haproxy() as directory:
        paths = _vllm_host.Paths(directory, directory / "data")
        docker = directory / "docker"
        docker.write_text(DOCKER)
        docker.chmod(0o755)
        config = render("haproxy.cfg.j2", vllm_served_name="agent-model", vllm_hold_seconds=20)
        assert old in config
        config = config.replace(old, new) if old else config
        if not said:
            _vllm_host.check_gateway(config, render("servers.cfg.j2"), paths, "image", str(docker))
            return
        with pytest.raises(SwapError, match="is not valid, and nothing was changed") as caught:
            _vllm_host.check_gateway(config, render("servers.cfg.j2"), paths, "image", str(docker))
        assert re.search(said, str(caught.value)), str(caught.value)


def test_a_configuration_that_is_refused_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = _vllm_host.Paths(tmp_path, tmp_path / "data")
    for file in (paths.servers, paths.gateway):
        file.parent.mkdir(parents=True)
    checked: list[str] = []

    def check(configuration: str, *_: object) -> None:
        checked.append(configuration)
        if "bad" in configuration:
            raise SwapError("not valid")

    monkeypatch.setattr(_vllm_host, "check_gateway", check)

    def prepare(configuration: str, servers: str, *, check_mode: bool = False) -> bool:
        params = {"configuration": configuration, "servers": servers, "gateway_image": "image"}
        return bool(vllm_swap.prepare(paths, params, check_mode=check_mode)["changed"])

    assert prepare("bad", "servers", check_mode=True)
    assert checked == []
    with pytest.raises(SwapError):
        prepare("bad", "servers")
    assert not paths.servers.exists()
    assert prepare("good", "servers")
    paths.gateway.write_text("good")
    # What is as it was is not checked again.
    assert not prepare("good", "servers")
    assert checked == ["bad", "good"]
    with pytest.raises(SwapError):
        prepare("bad", "others")
    assert paths.servers.read_text() == "servers"


def test_the_gateways_image_is_there_before_its_configuration_is_checked() -> None:
    names = [task["name"] for task in yaml.safe_load((TEMPLATES.parent / "tasks" / "main.yml").read_text())]
    assert names.index("Make the images available") < names.index("Configure the gateway")
