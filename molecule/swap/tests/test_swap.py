"""Swaps on a real host, with real Docker, systemd and HAProxy, and scripted models, while requests come in.

They run in this order. Each begins with a model that serves, and ends with one.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import pytest
from swap_host import GATEWAY, ROOT, SwapHost

HOST = SwapHost("agent-stack-swap", ROOT / "molecule" / "swap" / "inventory" / "hosts.yml", "molecule/swap/tests/model.yml")
WATCHDOG = "agent-stack-vllm-watchdog.service"
RATE = 30
ONE_GPU = ["sleep", "hold_and_recreate"]
# The tiers: `make test` runs the quick ones, `make test-all` all but the long ones, `make drills` all.
QUICK, LONG = pytest.mark.quick, pytest.mark.long


def check_serves(model: str) -> None:
    """The gateway, systemd, Docker and the record say the same."""
    assert HOST.serving() == model
    record = HOST.state()
    active = record["active"]
    assert record["target"] == ""
    assert record["slots"][active]["model"] == f"/srv/models/{model}"
    for slot in ("blue", "green"):
        marked = HOST.on_host("ls", f"/opt/agent-stack/vllm-{slot}/standby", check=False) != ""
        assert marked == (slot in record["slots"] and slot != active)
        policy = HOST.on_host("docker", "inspect", "--format", "{{.HostConfig.RestartPolicy.Name}}", f"agent-stack-vllm-{slot}-server-1", check=False)
        assert policy in (("unless-stopped",) if slot == active else ("no", ""))
    kept = HOST.on_host("cat", "/opt/agent-stack/vllm/servers/servers.cfg")
    assert re.findall(r"^ +server (\w+) .*(?<! disabled)$", kept, re.M) == ["hold", active, active]


def settled(model: str) -> None:
    """Have this model serve, whatever was before."""
    done = HOST.swap(model)
    assert done.returncode == 0, done.output
    check_serves(model)


@pytest.fixture(scope="session", autouse=True)
def _as_converged() -> None:
    """What an earlier run of these drills left."""
    settled("first")
    assert HOST.play(playbook="playbooks/prune.yml").returncode == 0


@LONG
def test_a_second_run_changes_nothing() -> None:
    done = HOST.play(playbook="molecule/swap/converge.yml")
    assert done.returncode == 0, done.output
    assert done.changed == 0, done.output


@QUICK
def test_swap_by_tag_under_load() -> None:
    with HOST.load(RATE) as traffic:
        done = HOST.play("--tags", "vllm", *HOST.wish("second"), playbook="molecule/swap/converge.yml")
    assert done.returncode == 0, done.output
    assert traffic.problems == []
    assert traffic.models == {"first", "second"}
    assert done.outcome == {"held_seconds": 0, "held": 0, "failed": 0}
    for phase in ("create", "start", "judge", "flip"):
        assert re.search(rf"^ +{phase} +[\d.]+ s +requests held: \d+, failed: 0$", done.output, re.M), done.output
    check_serves("second")


@QUICK
def test_the_same_again_changes_nothing() -> None:
    started = "{{.State.StartedAt}}"
    before = HOST.on_host("docker", "inspect", "--format", started, "agent-stack-vllm-green-server-1", GATEWAY)
    done = HOST.play("--tags", "vllm", *HOST.wish("second"), playbook="molecule/swap/converge.yml")
    assert done.returncode == 0, done.output
    assert done.changed == 0, done.output
    assert HOST.on_host("docker", "inspect", "--format", started, "agent-stack-vllm-green-server-1", GATEWAY) == before


@QUICK
def test_check_mode_says_that_it_would_change() -> None:
    done = HOST.swap("third", "side_by_side", "--check")
    assert (done.returncode, done.changed) == (0, 1), done.output
    check_serves("second")


@QUICK
def test_rollback() -> None:
    with HOST.load(RATE) as traffic:
        done = HOST.play(playbook="playbooks/rollback.yml")
    assert done.returncode == 0, done.output
    assert traffic.problems == []
    check_serves("first")


@pytest.mark.parametrize("strategy", ONE_GPU)
def test_one_gpu(strategy: str) -> None:
    """The two never run at once: requests wait for as long as one sleeps or stops and the other loads."""
    settled("first")
    assert HOST.play(playbook="playbooks/prune.yml").returncode == 0
    sleep, loading = 1, 4
    with HOST.load(RATE) as traffic:
        done = HOST.swap(f"{strategy}-slow-{loading}-nap-{sleep}", strategy)
        assert done.returncode == 0, done.output
        again = HOST.swap("first", strategy)
        assert again.returncode == 0, again.output
    assert traffic.problems == []
    assert done.outcome["failed"] == 0
    assert done.outcome["held"] > RATE
    assert done.outcome["held_seconds"] < loading + 5
    # Back to the first: the one that serves naps for a second, and the first one wakes at once, or starts again.
    assert again.outcome["held_seconds"] < sleep + 5
    check_serves("first")


@pytest.mark.parametrize("strategy", ["sleep", pytest.param("hold_and_recreate", marks=LONG)])
def test_rollback_on_one_gpu(strategy: str) -> None:
    settled("first")
    assert HOST.swap(f"new-{strategy}-nap-30", strategy).returncode == 0
    with HOST.load(RATE) as traffic:
        done = HOST.play(playbook="playbooks/rollback.yml")
    assert done.returncode == 0, done.output
    assert traffic.problems == []
    slowest = traffic.percentile(1)
    assert slowest < 6, f"a request waited for {slowest} s"
    check_serves("first")


@pytest.mark.parametrize(
    ("model", "strategy", "reason"),
    [
        pytest.param("a-dull", "side_by_side", "was judged unfit: .*did not answer with a completion", marks=QUICK),
        pytest.param("a-blunt", "side_by_side", "was judged unfit: the model called no tool", marks=LONG),
        ("a-dying", "side_by_side", "ended while it was starting.*CUDA out of memory, says the script"),
        ("a-slow-90", "side_by_side", "was not ready after 30 seconds"),
        pytest.param("a-dying", "sleep", "ended while it was starting", marks=LONG),
        ("a-dull", "hold_and_recreate", "was judged unfit"),
    ],
)
def test_a_bad_model_never_serves(model: str, strategy: str, reason: str) -> None:
    settled("first")
    with HOST.load(RATE) as traffic:
        done = HOST.swap(model, strategy, "-e", "vllm_start_timeout_seconds=30")
    assert done.returncode == 2
    assert re.search(reason, " ".join(done.output.split())), done.output
    assert traffic.problems == []
    assert traffic.models == {"first"}
    check_serves("first")


def test_a_golden_prompt_decides() -> None:
    done = HOST.swap("eloquent", "side_by_side", "-e", '{"vllm_golden_prompts": [{"prompt": "6 x 7?", "expect": "42"}]}')
    assert done.returncode == 2
    assert "the answer to '6 x 7?' was 'I see 1 user message." in " ".join(done.output.split())
    check_serves("first")


def test_two_at_once() -> None:
    settled("first")
    one = HOST.start_play(*HOST.wish("one-slow-8"))
    wait_for_phase("load", one)
    other = HOST.swap("another")
    assert other.returncode == 2
    assert re.search(r"another run is under way on this host, and this one did nothing: present /srv/models/one-slow-8, process \d+, since", other.output)
    output, _ = one.communicate(timeout=120)
    assert one.returncode == 0, output
    check_serves("one-slow-8")


def wait_for_phase(phase: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while HOST.phase() != phase:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"never seen: {phase}"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("strategy", "phase", "what"),
    [
        pytest.param("sleep", "judge", "the play", marks=QUICK),
        ("sleep", "load", "all of it"),
        ("hold_and_recreate", "load", "all of it"),
        pytest.param("sleep", "sleep", "the play", marks=LONG),
        pytest.param("sleep", "load", "the play", marks=LONG),
        pytest.param("sleep", "sleep", "all of it", marks=LONG),
        pytest.param("sleep", "judge", "all of it", marks=LONG),
        pytest.param("side_by_side", "judge", "all of it", marks=LONG),
    ],
)
def test_killed_and_repeated(strategy: str, phase: str, what: str) -> None:
    """kill -9 of the play leaves a swap that ends by itself; of the process on the host, one that the next run undoes and makes again."""
    settled("old-nap-2")
    golden = '{"vllm_golden_prompts": [{"prompt": "[[delay 2]] hello", "expect": "I see"}]}'
    model = f"{strategy}-{phase}-{what.replace(' ', '')}-slow-3"
    wishes = [*HOST.wish(model, strategy), "-e", golden]
    with HOST.load(RATE) as traffic:
        process = HOST.start_play(*wishes)
        wait_for_phase(phase, process)
        worker = HOST.process_of_the_run()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if what == "all of it":
            HOST.on_host("kill", "-9", str(worker))
        else:
            deadline = time.monotonic() + 60
            while HOST.phase():
                assert time.monotonic() < deadline
                time.sleep(0.2)
            check_serves(model)
        done = HOST.play(*wishes)
        assert done.returncode == 0, done.output
        assert done.changed == (1 if what == "all of it" else 0)
    assert traffic.problems == []
    assert traffic.models == {"old-nap-2", model}
    check_serves(model)


@pytest.mark.parametrize(
    ("strategy", "phase"), [("sleep", "sleep"), pytest.param("sleep", "load", marks=LONG), pytest.param("hold_and_recreate", "load", marks=LONG)]
)
def test_nobody_repeats_a_swap_that_was_cut_off(strategy: str, phase: str) -> None:
    """Requests are held when its process dies, and the watchdog has the old model answer them, also one that was still falling asleep."""
    # Longer than the watchdog waits for the answer whether a model sleeps.
    old = "old-nap-7" if phase == "sleep" else "old-nap-1"
    settled(old)
    before = recoveries()
    with HOST.load(RATE) as traffic:
        process = HOST.start_play(*HOST.wish(f"cut-off-{strategy}-{phase}-slow-20", strategy))
        wait_for_phase(phase, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        HOST.on_host("kill", "-9", str(HOST.process_of_the_run()))
        HOST.on_host("systemctl", "start", WATCHDOG)
        # The load goes on for longer than the model takes to fall asleep.
        time.sleep(8 if phase == "sleep" else 0)
    assert traffic.problems == []
    assert traffic.models == {old}
    check_serves(old)
    # The timer may have been earlier than this drill.
    assert recoveries() == before + 1


def recoveries() -> int:
    text = HOST.on_host("cat", "/var/lib/agent-stack/textfile/vllm_watchdog.prom", check=False)
    return int((re.findall(r"recovered_total (\d+)", text) or ["0"])[0])


def test_a_restarted_target_starts_only_what_serves() -> None:
    settled("first")
    assert HOST.swap("second", "hold_and_recreate").returncode == 0
    # What systemd was told before the swap must not count.
    stop_target()
    HOST.on_host("systemctl", "start", "agent-stack.target")
    wait_until_serves("second")
    running = HOST.on_host("docker", "ps", "--format", "{{.Names}}", "--filter", "name=agent-stack-vllm-.*-server").split()
    assert running == [container()]
    assert HOST.play(playbook="playbooks/rollback.yml").returncode == 0
    check_serves("first")


def test_a_target_stopped_while_a_model_starts_leaves_nothing_running() -> None:
    settled("first")
    unit = f"agent-stack@vllm-{HOST.state()['active']}"
    # The container runs, and Compose waits for it to be healthy.
    waiting = f'[ "$(systemctl is-active {unit})" = activating ] && [ -n "$(docker ps --quiet --filter name={container()})" ]'
    HOST.on_host("timeout", "30", "sh", "-c", f"systemctl restart --no-block {unit}; until {waiting}; do sleep 0.02; done")
    stop_target()
    HOST.on_host("systemctl", "start", "agent-stack.target")
    wait_until_serves("first")


def wait_until_serves(model: str) -> None:
    deadline = time.monotonic() + 60
    while HOST.on_host("systemctl", "is-active", f"agent-stack@vllm-{HOST.state()['active']}", check=False) != "active":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    check_serves(model)


def stop_target() -> None:
    HOST.on_host("systemctl", "stop", "agent-stack.target")
    deadline = time.monotonic() + 90
    while HOST.on_host("docker", "ps", "--quiet"):
        assert time.monotonic() < deadline, HOST.on_host("docker", "ps")
        time.sleep(0.5)


def test_the_host_restarts_during_a_swap() -> None:
    settled("first")
    process = HOST.start_play(*HOST.wish("never-slow-60", "hold_and_recreate"))
    wait_for_phase("load", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(["docker", "restart", "--timeout", "20", HOST.name], check=True, capture_output=True)
    deadline = time.monotonic() + 90
    while "watchdog" not in HOST.on_host("systemctl", "list-timers", "--no-legend", check=False) or HOST.on_host("docker", "ps", "--quiet", check=False) == "":
        assert time.monotonic() < deadline
        time.sleep(1)
    # The timer would do it a minute after the boot.
    HOST.on_host("systemctl", "start", WATCHDOG)
    check_serves("first")


def test_the_gateway_restarts_and_goes_on() -> None:
    settled("first")
    HOST.on_host("docker", "restart", GATEWAY)
    check_serves("first")


def test_prune() -> None:
    settled("second")
    assert len(HOST.state()["slots"]) == 2
    done = HOST.play(playbook="playbooks/prune.yml")
    assert done.returncode == 0, done.output
    assert len(HOST.on_host("docker", "ps", "--all", "--quiet", "--filter", "name=agent-stack-vllm-.*-server").split()) == 1
    assert HOST.play(playbook="playbooks/prune.yml").changed == 0
    nothing = HOST.play(playbook="playbooks/rollback.yml")
    assert nothing.returncode == 2
    assert "there is nothing to roll back to: only one model is there" in nothing.output
    check_serves("second")


def test_the_watchdog_restarts_what_is_stuck_and_nothing_else() -> None:
    """With the scenario's five seconds instead of minutes. The scripted engine counts its steps when an answer is complete."""
    settled("first")
    address = HOST.on_host("docker", "inspect", "--format", '{{(index .NetworkSettings.Networks "agent-stack-model").IPAddress}}', container())
    started = HOST.on_host("docker", "inspect", "--format", "{{.State.StartedAt}}", container())
    hang = f"""curl --silent --max-time 120 --json '{{"model": "agent-model", "messages": [{{"role": "user", "content": "[[fault hang]]"}}]}}' http://{address}:8000/v1/chat/completions"""
    with HOST.load(RATE):
        process = subprocess.Popen(["docker", "exec", HOST.name, "sh", "-c", hang], stdout=subprocess.DEVNULL)
        look_for(12)
        assert HOST.on_host("docker", "inspect", "--format", "{{.State.StartedAt}}", container()) == started, "a busy engine was restarted"
    assert restarts() == 0
    look_for(12)
    assert process.wait(timeout=30) != 0
    assert HOST.on_host("docker", "inspect", "--format", "{{.State.StartedAt}}", container()) != started, "a stuck engine was not restarted"
    assert restarts() == 1
    check_serves("first")
    look_for(7)
    assert restarts() == 1


def look_for(seconds: float) -> None:
    """Have the watchdog look every other second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        HOST.on_host("systemctl", "start", WATCHDOG)
        time.sleep(2)


def container() -> str:
    return f"agent-stack-vllm-{HOST.state()['active']}-server-1"


def restarts() -> int:
    text = HOST.on_host("cat", "/var/lib/agent-stack/textfile/vllm_watchdog.prom")
    return int(re.findall(r'restarts_total{reason="stalled"} (\d+)', text)[0])
