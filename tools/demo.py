"""`make demo`: deploy the whole stack to a throw-away host, then prove over HTTPS that it works.

    python tools/demo.py run [--port 8443]     deploy (again) and prove
    python tools/demo.py clean                 remove everything that the demo made

Runs in the checkout's virtual environment. Prints what it does as it does it; exits with 1 and the last log lines of
the service that failed.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools" / "host"))
import host as test_host  # noqa: E402

NAME = "agent-stack-demo"
DOMAIN = "agent.localhost"
INVENTORY = ROOT / "inventories" / "demo"
SECRETS = INVENTORY / "group_vars" / "all" / "secrets.yml"
STATE = ROOT / ".demo"
CA_FILE = STATE / "ca.pem"
MACHINE = ROOT / ".cache" / "machine.json"
# What the slots of the model hold, on the host.
SLOTS = "/var/lib/agent-stack/vllm/swap.json"
# A task that prints nothing for this long gets a line that says that it is still at work.
QUIET_SECONDS = 15


class DemoError(Exception):
    """The demo did not prove what it is there to prove; the message is for the user."""


class Phases:
    """Names and durations of what was done, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started
        print(f"== {name}: {self.seconds[name]:.0f} s", flush=True)


def on_host(*command: str, stdin: str | None = None, check: bool = True) -> str:
    """Run a command on the demo host and return its output. Raises HostError."""
    return test_host.run("docker", "exec", "-i", NAME, *command, stdin=stdin, check=check)


def play() -> None:
    """Run site.yml with its output shown, and a sign of life while a long task prints nothing."""
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "site.yml", "-i", str(INVENTORY), "-e", f"@{MACHINE}"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "ANSIBLE_DISPLAY_SKIPPED_HOSTS": "false"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last_output = time.monotonic()

    def watch() -> None:
        while process.poll() is None:
            time.sleep(1)
            quiet = time.monotonic() - last_output
            if quiet >= QUIET_SECONDS and int(quiet) % QUIET_SECONDS == 0:
                print(f"   ... still at it after {quiet:.0f} s", flush=True)

    threading.Thread(target=watch, daemon=True).start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            last_output = time.monotonic()
            print(line, end="", flush=True)
    except KeyboardInterrupt:
        # A play that nobody sees must not go on.
        process.terminate()
        process.wait()
        raise
    if process.wait() != 0:
        raise DemoError("The play failed; its last lines above say where.")


def trust_pebble() -> None:
    """Keep the root of the demo's certificate authority, so that TLS is verified and not ignored."""
    STATE.mkdir(exist_ok=True)
    CA_FILE.write_text(on_host("cat", "/var/lib/pebble/roots.pem") + "\n")


class Loopback(http.client.HTTPSConnection):
    """HTTPS to the demo's name at 127.0.0.1, with the certificate verified, whatever this machine's resolver makes of the name."""

    def connect(self) -> None:
        connection = socket.create_connection(("127.0.0.1", self.port), self.timeout)
        self.sock = ssl.create_default_context(cafile=str(CA_FILE)).wrap_socket(connection, server_hostname=DOMAIN)


def ask(port: int, path: str, body: bytes | None = None, password: str | None = None, key: str | None = None) -> tuple[int, bytes]:
    """Ask nginx over verified HTTPS, with a login if a password is given, or an API key. Return the status and the body."""
    headers = {"Content-Type": "application/json"}
    if password is not None:
        headers["Authorization"] = "Basic " + base64.b64encode(f"agent:{password}".encode()).decode()
    if key is not None:
        headers["X-Api-Key"] = key
    connection = Loopback(DOMAIN, port, timeout=180)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def request(port: int, path: str, body: dict[str, Any] | None = None, password: str | None = None) -> tuple[int, dict[str, Any]]:
    """Ask with JSON. Return the status and the JSON answer."""
    status, text = ask(port, path, None if body is None else json.dumps(body).encode(), password)
    return status, json.loads(text)


def active_slot() -> str:
    """Return the slot whose model serves: after a change of the model or its settings it is the other one. Raises DemoError."""
    slot: str = json.loads(on_host("cat", SLOTS))["active"]
    if not slot:
        raise DemoError(f"No model serves: {SLOTS} on the host names no active slot.")
    return slot


def model_counters() -> dict[str, float]:
    """Return vLLM's own counts of prompt and generated tokens."""
    script = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/metrics', timeout=10).read().decode())"
    slot = active_slot()
    with ask_of(f"vllm-{slot}", "server"):
        text = on_host("docker", "exec", f"agent-stack-vllm-{slot}-server-1", "python3", "-c", script)
    return {name: sum(map(float, re.findall(rf"^vllm:{name}_total{{.*}} (\S+)$", text, re.M))) for name in ("prompt_tokens", "generation_tokens")}


def chat(port: int, password: str, message: str, thread_id: str | None = None) -> tuple[dict[str, Any], dict[str, float], float]:
    """Do one turn. Return the answer, the tokens that vLLM counted for it, and the seconds it took."""
    before = model_counters()
    started = time.monotonic()
    body = {"message": message} if thread_id is None else {"message": message, "thread_id": thread_id}
    status, answer = request(port, "/chat", body, password)
    seconds = time.monotonic() - started
    if status != 200 or not answer.get("response"):
        raise DemoError(f"POST /chat answered {status}: {answer}")
    after = model_counters()
    print(f"   > {message}\n   < {answer['response'][:300]!r}", flush=True)
    return answer, {name: after[name] - before[name] for name in after}, seconds


def logs(component: str, service: str) -> str:
    """Return the last lines of a service's log, for an error message. Raises nothing: the error that it is for matters more."""
    try:
        return on_host("docker", "compose", "--file", f"/opt/agent-stack/{component}/compose.yml", "logs", "--no-color", "--tail", "20", service)
    except test_host.HostError as error:
        return f"They cannot be read: {error}"


@contextmanager
def ask_of(component: str, service: str) -> Iterator[None]:
    """Whatever goes wrong inside is told in one sentence, with the last lines of the service that was asked."""
    try:
        yield
    except Exception as error:
        raise DemoError(f"{sentence(error)}\nLast lines of {service}:\n{logs(component, service)}") from error


def sentence(error: BaseException) -> str:
    """Say what went wrong. Our own errors are sentences already; of others the kind is the better half of what they say."""
    return str(error) if isinstance(error, DemoError | test_host.HostError) else f"{type(error).__name__}: {error}"


def expect(claim: str, found: object, good: bool) -> None:
    """Print a claim with what was found, or raise DemoError."""
    if not good:
        raise DemoError(f"{claim}: not so, found {found}")
    print(f"   ok: {claim} ({found})", flush=True)


def prove(port: int, password: str) -> float:
    """Talk to the stack as a user does, and look at the traces. Return generated tokens per second."""
    with ask_of("agent", "agent"):
        status, _ = request(port, "/health")
        expect("GET /health answers without a login", status, status == 200)
        status, _ = request(port, "/chat", {"message": "hello"})
        expect("POST /chat wants a login", status, status == 401)
        status, _ = request(port, "/v1/models", password=password)
        expect("/v1/ is closed", status, status in {403, 404})

        first, first_tokens, first_seconds = chat(port, password, "My name is Ada and I live in Turin. What is the capital of France?")
        second, second_tokens, second_seconds = chat(port, password, "Where do I live?", first["thread_id"])
        expect("the follow-up stays on its thread", second["thread_id"], second["thread_id"] == first["thread_id"])
        history = first_tokens["prompt_tokens"] + first_tokens["generation_tokens"]
        found = f"{second_tokens['prompt_tokens']:.0f} prompt tokens after {history:.0f} in the first turn"
        expect("the earlier turn reaches the model", found, second_tokens["prompt_tokens"] >= history)

    with ask_of("postgres", "postgres"):
        # The id is the agent's own answer.
        query = f"SELECT count(*) FROM checkpoints WHERE thread_id = '{first['thread_id']}'"  # noqa: S608
        container = "agent-stack-postgres-postgres-1"
        rows = on_host("docker", "exec", "-i", container, "psql", "--username=postgres", "--dbname=agent", "-At", stdin=query)
        expect("the conversation is in Postgres", f"{rows} rows in checkpoints", int(rows) > 0)

    with ask_of("monitoring", "prometheus"):
        targets = json.loads(on_host("curl", "--silent", "--fail", "http://127.0.0.1:9090/api/v1/targets"))["data"]["activeTargets"]
        down = [f"{target['labels']['job']}: {target['lastError']}" for target in targets if target["health"] != "up"]
        expect("all Prometheus targets are up", ", ".join(down) or f"{len(targets)} targets", bool(targets) and not down)

    listeners = on_host("ss", "--listening", "--tcp", "--numeric", "--no-header").splitlines()
    addresses = {line.split()[3] for line in listeners}
    open_ports = sorted({int(address.rpartition(":")[2]) for address in addresses if not re.match(r"127\.|\[::1\]", address)})
    expect("nothing but 22, 80 and 443 listens off loopback", open_ports, set(open_ports) <= {22, 80, 443} and 443 in open_ports)
    return (first_tokens["generation_tokens"] + second_tokens["generation_tokens"]) / (first_seconds + second_seconds)


def run(port: int) -> None:
    phases = Phases()
    with phases("host: start a bare Debian 13 server in a container"):
        test_host.up(NAME, DOMAIN, [f"127.0.0.1:{port}:443"])
        MACHINE.parent.mkdir(exist_ok=True)
        test_host.run(sys.executable, str(ROOT / "tools" / "machine.py"), str(MACHINE))
    with phases("deploy: ansible-playbook site.yml -i inventories/demo"):
        play()
    with phases("prove: talk to it over HTTPS"):
        trust_pebble()
        password = yaml.safe_load(SECRETS.read_text())["agent_stack_secrets"]["nginx_certbot_password"]
        tokens_per_second = prove(port, password)
    print(f"\nThe stack answers at https://{DOMAIN}:{port}/ (its certificate authority: {CA_FILE.relative_to(ROOT)}).")
    print(f"User `agent`; the password is nginx_certbot_password in {SECRETS.relative_to(ROOT)}. For example:\n")
    print(f"  curl --cacert {CA_FILE.relative_to(ROOT)} --resolve {DOMAIN}:{port}:127.0.0.1 --user agent \\")
    print(f'    --json \'{{"message": "Hello"}}\' https://{DOMAIN}:{port}/chat\n')
    for name, seconds in phases.seconds.items():
        print(f"{seconds:6.0f} s  {name}")
    print(f"{sum(phases.seconds.values()):6.0f} s  in all; the model wrote {tokens_per_second:.1f} tokens/s")


def clean(_port: int) -> None:
    # Files first: they can go without an engine.
    shutil.rmtree(STATE, ignore_errors=True)
    for file in (SECRETS, SECRETS.with_name("api_keys.yml")):
        file.unlink(missing_ok=True)
    test_host.down(NAME)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "clean"])
    parser.add_argument("--port", type=int, default=8443)
    arguments = parser.parse_args()
    commands: dict[str, Callable[[int], None]] = {"run": run, "clean": clean}
    try:
        commands[arguments.command](arguments.port)
    except KeyboardInterrupt:
        print("\ninterrupted: `make demo` goes on from here, `make demo-clean` removes what there is.", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"\nerror: {sentence(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
