"""The order of a swap's steps, on a host made of dictionaries: what users meet, and what is left when a run is killed at any of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_swap import HOLD, Limits, State, Swap, SwapError, Traffic, Wish

BLUE_TAKES, GREEN_TAKES, ASLEEP_TAKES = 60, 60, 2
SLEEP_TAKES = 10  # seconds
IMPORT_TAKES = 3


class Killed(BaseException):
    """The process ended here, as with kill -9."""


class World:
    """What outlives a run: containers, the gateway, systemd, the file of the state."""

    # Whether servers can wait for the GPU, and pin their weights ahead of a sleep.
    gates = False
    pins = False

    def __init__(self, memory: int = 1000) -> None:
        self.memory = memory
        self.containers: dict[str, dict[str, Any]] = {}
        self.route = HOLD
        self.file = ""
        self.enabled: set[str] = set()
        self.kept = ""
        self.answered: list[str] = []
        self.lost: list[str] = []
        self.clock = 0.0

    def pass_time(self, seconds: float) -> None:
        """An engine falls asleep even if nobody waits for it any more."""
        self.clock += seconds
        for container in self.containers.values():
            if container.get("sleeps_at", self.clock + 1) <= self.clock:
                container["asleep"] = True
                del container["sleeps_at"]

    def used(self) -> int:
        return sum(ASLEEP_TAKES if c["asleep"] else c["takes"] for c in self.containers.values() if c["running"] and not c.get("gate"))

    def request(self) -> None:
        """One request arrives. Held ones are answered later, so they are no loss."""
        if self.route == HOLD:
            return
        container = self.containers.get(self.route)
        if container and container["running"] and container["asleep"]:
            self.lost.append(f"{self.route} sleeps")
        elif container and container["running"] and not container["ready_at"] > self.clock:
            self.answered.append(container["model"])
        # One that is down makes requests wait as well: the connection is refused, and tried again.


@pytest.fixture(params=[False, True], ids=["", "ahead"], autouse=True)
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Each test is for servers that can wait for the GPU, and for those that cannot."""
    monkeypatch.setattr(World, "gates", request.param)
    return bool(request.param)


class FakeHost:
    def __init__(self, world: World, *, kill_at: int = -1, before: bool = False, fate: dict[str, str] | None = None) -> None:
        self.world = world
        self.kill_at = kill_at
        self.before = before
        self.fate = fate or {}
        self.steps = 0
        self.names: list[str] = []
        self.requests: dict[str, int] = {}
        self.fails: dict[str, Exception] = {}
        self.late: dict[str, int] = {}

    def step(self, name: str, act: Callable[[], None]) -> None:
        """A change of the world; the run may be killed right before or right after it, and the change may fail."""
        if name in self.fails:
            self.names.append(name)
            raise self.fails[name]
        mine = self.steps
        self.steps += 1
        self.names.append(name)
        if mine == self.kill_at and self.before:
            raise Killed
        act()
        self.world.request()
        if mine == self.kill_at:
            raise Killed

    def now(self) -> float:
        return self.world.clock

    def pause(self, seconds: float) -> None:
        self.world.pass_time(seconds)
        self.world.request()

    def save(self, state: State) -> None:
        self.step("save", lambda: setattr(self.world, "file", state.to_json()))

    def status(self, slot: str) -> str:
        container = self.world.containers.get(slot)
        if container is None:
            return "absent"
        if container["running"] and self.fate.get(container["model"]) == "dies" and self.world.clock >= container["ready_at"] - 1:
            container["running"] = False
        return "running" if container["running"] else "stopped"

    def create(self, slot: str, definition: dict[str, Any]) -> None:
        model = definition["command"][0]

        def act() -> None:
            self.world.containers[slot] = {"model": model, "takes": BLUE_TAKES, "running": False, "asleep": False, "ready_at": 0.0, "policy": "no"}
            if self.world.gates:
                self.world.containers[slot]["gate"] = ""

        self.step(f"create {slot}", act)

    def start(self, slot: str) -> None:
        def act() -> None:
            container = self.world.containers[slot]
            seconds = 10_000 if self.fate.get(container["model"]) == "slow" else 5
            if not container.get("gate"):
                container.update(born=f"{slot} {self.world.clock} {self.steps}")
            container.pop("sleeps_at", None)
            container.update({"running": True, "asleep": False, "ready_at": self.world.clock + seconds} | ({"gate": ""} if "gate" in container else {}))
            assert self.world.used() <= self.world.memory, "more memory than there is"

        self.step(f"start {slot}", act)

    def start_ahead(self, slot: str) -> bool:
        container = self.world.containers[slot]
        if "gate" not in container:
            return False

        def act() -> None:
            seconds = 10_000 if self.fate.get(container["model"]) == "imports slowly" else IMPORT_TAKES
            container.update(running=True, asleep=False, ready_at=1e9, gate="shut", imported_at=self.world.clock + seconds)
            container.update(born=f"{slot} {self.world.clock} {self.steps}")

        self.step(f"ahead {slot}", act)
        return True

    def waits(self, slot: str) -> bool:
        return bool(self.world.containers[slot].get("gate"))

    def imported(self, slot: str) -> bool:
        container = self.world.containers[slot]
        if self.fate.get(container["model"]) == "cannot import" and self.world.clock >= container["imported_at"] - 1:
            container["running"] = False
        return bool(container["imported_at"] <= self.world.clock)

    def pin(self, slot: str, weights_mib: int) -> bool:
        assert slot == State.from_json(self.world.file).active
        assert self.world.route == slot, "requests were held"
        if self.world.pins:
            self.step(f"pin {slot}", lambda: None)
        return self.world.pins

    def stop(self, slot: str, *, at_once: bool) -> None:
        def act() -> None:
            if slot in self.world.containers:
                if slot == State.from_json(self.world.file).active:
                    assert not self.requests.get(slot), "requests were running"
                self.world.containers[slot].pop("sleeps_at", None)
                self.world.containers[slot].update(running=False, asleep=False)

        self.step(f"stop {slot}", act)

    def remove(self, slot: str) -> None:
        self.step(f"remove {slot}", lambda: self.world.containers.__delitem__(slot) if slot in self.world.containers else None)

    def log(self, slot: str) -> str:
        return "the last words"

    def born(self, slot: str) -> str:
        return str(self.world.containers.get(slot, {}).get("born", ""))

    def check(self) -> None:
        if "check" in self.fails:
            raise self.fails["check"]

    def ready(self, slot: str) -> bool:
        if self.late.get(slot, 0):
            self.late[slot] -= 1
            return False
        container = self.world.containers.get(slot)
        return container is not None and self.status(slot) == "running" and bool(container["ready_at"] <= self.world.clock)

    def asleep(self, slot: str) -> bool:
        return bool(self.world.containers.get(slot, {}).get("asleep"))

    def sleep(self, slot: str) -> None:
        """The engine takes its time, and one order after the other. A run that is killed right after it gave the order does not wait for it."""
        assert not self.requests.get(slot), "requests were running"
        container = self.world.containers[slot]
        if not container["asleep"]:
            self.step(f"sleep {slot}", lambda: container.setdefault("sleeps_at", self.world.clock + SLEEP_TAKES))
            self.world.pass_time(SLEEP_TAKES)

    def wake(self, slot: str) -> None:
        def act() -> None:
            self.world.pass_time(SLEEP_TAKES if "sleeps_at" in self.world.containers[slot] else 0)
            self.world.containers[slot].update(asleep=False)
            assert self.world.used() <= self.world.memory, "more memory than there is"

        self.step(f"wake {slot}", act)

    def busy(self, slot: str) -> int:
        left = self.requests.get(slot, 0)
        self.requests[slot] = max(0, left - 1)
        return left

    def judge(self, slot: str, *, briefly: bool) -> list[str]:
        return ["it answers nonsense"] if self.fate.get(self.world.containers[slot]["model"]) == "bad" else []

    def route(self, to: str) -> bool:
        changed = bool(self.world.route != to)
        self.step(f"route {to}", lambda: setattr(self.world, "route", to))
        return changed

    def keep_route(self, slot: str) -> bool:
        changed = bool(self.world.kept != slot)
        self.step(f"keep {slot}", lambda: setattr(self.world, "kept", slot))
        return changed

    def promote(self, slot: str) -> bool:
        changed = bool(slot not in self.world.enabled)

        def act() -> None:
            self.world.enabled.add(slot)
            self.world.containers[slot]["policy"] = "unless-stopped"

        self.step(f"promote {slot}", act)
        return changed

    def demote(self, slot: str) -> bool:
        def act() -> None:
            self.world.enabled.discard(slot)
            if slot in self.world.containers:
                self.world.containers[slot]["policy"] = "no"

        self.step(f"demote {slot}", act)
        return True

    def traffic(self) -> Traffic:
        return Traffic(3 if self.world.route == HOLD else 0, 0)


def wish(model: str, strategy: str = "side_by_side", *, sleep_mode: bool = True) -> Wish:
    command = [model, "--gpu-memory-utilization", "0.9"]
    return Wish(model, {"image": "vllm", "command": command}, strategy, weights_mib=1, utilization=0.9, beside_utilization=0.4, sleep_mode=sleep_mode)


def run(world: World, act: Callable[[Swap], None], **how: Any) -> tuple[Swap, FakeHost]:
    host = FakeHost(world, **how)
    state = State.from_json(world.file) if world.file else State()
    swap = Swap(host, state, Limits(start=60, drain=20), lambda phase, traffic: None)
    act(swap)
    return swap, host


def present(world: World, wished: Wish, **how: Any) -> tuple[Swap, FakeHost]:
    return run(world, lambda swap: swap.present(wished), **how)


def serving(memory: int = 1000, **options: Any) -> World:
    world = World(memory)
    present(world, wish("old", **options))
    return world


def check_serves(world: World, model: str) -> None:
    """All that is said about what serves must say the same, also after a while."""
    world.pass_time(100)
    world.request()
    state = State.from_json(world.file)
    assert state.target == ""
    assert world.route == world.kept == state.active
    assert world.enabled == {state.active}
    serving = world.containers[state.active]
    assert serving == serving | {"model": model, "running": True, "asleep": False, "policy": "unless-stopped"}
    assert state.slots[state.active].model == model
    assert set(world.containers) == set(state.slots)
    for name, container in world.containers.items():
        assert name == state.active or container["policy"] == "no"
    assert world.lost == []


ONE_GPU = 70
WAYS = [
    pytest.param(1000, "side_by_side", id="side_by_side"),
    pytest.param(ONE_GPU, "sleep", id="sleep"),
    pytest.param(ONE_GPU, "hold_and_recreate", id="hold"),
]


def test_first_model() -> None:
    world = serving()
    check_serves(world, "old")
    assert set(world.containers) == {"blue"}


def test_the_same_again_changes_nothing() -> None:
    world = serving()
    before = copy.deepcopy(world.containers)
    swap, host = present(world, wish("old"))
    assert not swap.changed
    assert world.containers == before
    assert not {name.split()[0] for name in host.names} & {"create", "start", "stop", "save", "sleep", "wake", "remove"}


@pytest.mark.parametrize(("memory", "strategy"), WAYS)
def test_swap_there_and_back(memory: int, strategy: str) -> None:
    world = serving(memory)
    swap, _ = present(world, wish("new", strategy))
    assert swap.changed
    assert (swap.held > 0) == (strategy != "side_by_side")
    check_serves(world, "new")
    assert len(world.containers) == 2
    run(world, lambda swap: swap.rollback())
    check_serves(world, "old")
    present(world, wish("new", strategy))
    check_serves(world, "new")
    run(world, lambda swap: swap.prune())
    check_serves(world, "new")
    assert len(world.containers) == 1


def test_beside_another_model_it_gets_the_share_that_is_left() -> None:
    world = serving()
    definitions: list[dict[str, Any]] = []
    host = FakeHost(world)
    create = host.create

    def remember(slot: str, definition: dict[str, Any]) -> None:
        definitions.append(definition)
        create(slot, definition)

    host.create = remember  # type: ignore[method-assign]
    state = State.from_json(world.file)
    Swap(host, state, Limits(60, 20), lambda phase, traffic: None).present(wish("new"))
    assert definitions[0]["command"][-1] == "0.4"
    assert state.slots["green"].utilization == 0.4
    # The share is not part of the wish: the same wish again finds it fulfilled.
    assert not present(world, wish("new"))[0].changed


def test_a_model_that_sleeps_is_only_woken() -> None:
    world = serving(ONE_GPU)
    present(world, wish("new", "sleep"))
    _, host = present(world, wish("old", "sleep"))
    assert "wake blue" in host.names
    assert not {"create blue", "start blue"} & set(host.names)
    check_serves(world, "old")


def test_on_the_way_back_a_model_that_never_slept_is_stopped() -> None:
    """Its first sleep would take seconds for which requests are held."""
    world = serving(ONE_GPU)
    present(world, wish("new", "sleep"))
    _, host = run(world, lambda swap: swap.rollback())
    assert "stop green" in host.names
    assert "sleep green" not in host.names
    check_serves(world, "old")


@pytest.mark.parametrize("fate", ["bad", "slow", "dies"])
@pytest.mark.parametrize(("memory", "strategy"), WAYS)
def test_a_bad_model_never_serves(memory: int, strategy: str, fate: str) -> None:
    world = serving(memory)
    with pytest.raises(SwapError, match=r"new \(green\)[\s\S]*the last words"):
        present(world, wish("new", strategy), fate={"new": fate})
    check_serves(world, "old")
    assert set(world.containers) == {"blue"}
    assert "new" not in world.answered


@pytest.mark.parametrize("strategy", ["sleep", "hold_and_recreate"])
def test_requests_that_take_too_long_are_not_cut_off(strategy: str) -> None:
    world = serving(ONE_GPU)
    host = FakeHost(world)
    host.requests = {"blue": 10_000}
    with pytest.raises(SwapError, match="requests of old"):
        Swap(host, State.from_json(world.file), Limits(60, 20), lambda phase, traffic: None).present(wish("new", strategy))
    assert not {"sleep blue", "stop blue", "start green"} & set(host.names)
    check_serves(world, "old")


def test_side_by_side_long_requests_end_in_peace() -> None:
    world = serving()
    host = FakeHost(world)
    host.requests = {"blue": 10_000}
    state = State.from_json(world.file)
    Swap(host, state, Limits(60, 20), lambda phase, traffic: None).present(wish("new"))
    check_serves(world, "new")
    assert state.slots["blue"].condition == "running"
    assert not world.containers["blue"]["asleep"]


def test_a_model_that_is_down_is_replaced() -> None:
    world = serving(ONE_GPU)
    world.containers["blue"]["running"] = False
    present(world, wish("new", "sleep"))
    check_serves(world, "new")


def test_what_serves_was_removed() -> None:
    world = serving()
    world.containers.clear()
    present(world, wish("old"))
    check_serves(world, "old")
    world.containers.clear()
    with pytest.raises(SwapError):
        present(world, wish("new"), fate={"new": "bad"})
    present(world, wish("new"))
    check_serves(world, "new")


def test_after_a_reboot_only_what_served_runs() -> None:
    world = serving(ONE_GPU)
    present(world, wish("new", "sleep"))
    for name, container in world.containers.items():
        container.update(asleep=False, running=name in world.enabled)
    assert not present(world, wish("new", "sleep"))[0].changed
    run(world, lambda swap: swap.rollback())
    check_serves(world, "old")


def broken(world: World, wished: Wish | None, fails: dict[str, Exception], fate: dict[str, str] | None = None) -> FakeHost:
    """A run in which some changes fail: a swap, or what else `wished` is not."""
    host = FakeHost(world, fate=fate)
    host.fails = fails
    swap = Swap(host, State.from_json(world.file), Limits(start=60, drain=20), lambda phase, traffic: None)
    if wished:
        swap.present(wished)
    else:
        swap.recover()
    return host


@pytest.mark.parametrize("error", [OSError("no space left on device"), ValueError("nobody thought of that"), SwapError("docker refused")])
@pytest.mark.parametrize("step", ["create green", "start green", "sleep blue"])
def test_whatever_goes_wrong_what_served_serves(step: str, error: Exception) -> None:
    world = serving(ONE_GPU)
    with pytest.raises(SwapError, match=str(error)):
        broken(world, wish("new", "sleep"), {step: error})
    check_serves(world, "old")


def test_a_gpu_that_is_away_is_noticed_before_requests_wait() -> None:
    world = serving(ONE_GPU)
    host = FakeHost(world)
    host.fails = {"check": SwapError("the host's GPU is away")}
    with pytest.raises(SwapError, match="GPU is away"):
        Swap(host, State.from_json(world.file), Limits(60, 20), lambda phase, traffic: None).present(wish("new", "sleep"))
    assert not {"route hold", "create green", "sleep blue"} & set(host.names)
    check_serves(world, "old")


def test_nothing_comes_back_and_a_good_model_serves_all_the_same() -> None:
    """What served is broken for good, and so is the first that is to replace it."""
    world = serving(ONE_GPU)
    world.containers["blue"]["running"] = False
    with pytest.raises(SwapError, match=r"new[\s\S]*does not come back either"):
        broken(world, wish("new", "sleep"), {"start blue": SwapError("blue is broken")}, {"new": "bad"})
    assert State.from_json(world.file).target == ""
    present(world, wish("good", "sleep"))
    check_serves(world, "good")


def test_a_flip_that_was_cut_off_goes_back_if_the_new_model_is_gone_for_good() -> None:
    world = serving()
    with pytest.raises(Killed):
        present(world, wish("new"), kill_at=kill_step("promote green"))
    assert State.from_json(world.file).active == "green"
    world.containers["green"]["running"] = False
    broken(world, None, {"start green": SwapError("green is broken")})
    check_serves(world, "old")
    present(world, wish("new"))
    check_serves(world, "new")


def kill_step(name: str) -> int:
    """The number of a step of a plain swap side by side."""
    world = serving()
    _, host = present(world, wish("new"))
    return host.names.index(name)


def test_a_model_that_does_not_fall_asleep_after_the_flip_is_stopped() -> None:
    world = serving()
    broken(world, wish("new"), {"sleep blue": SwapError("it does not fall asleep")})
    check_serves(world, "new")
    assert State.from_json(world.file).slots["blue"].condition == "stopped"
    run(world, lambda swap: swap.rollback())
    check_serves(world, "old")


@pytest.mark.parametrize("strategy", ["sleep", "hold_and_recreate"])
def test_a_model_that_loads_longer_than_requests_are_held_is_given_up(strategy: str) -> None:
    world = serving(ONE_GPU)
    host = FakeHost(world, fate={"new": "slow"})
    started = world.clock
    with pytest.raises(SwapError, match=r"requests had been held for \d+ seconds, and new \(green\) did not answer yet"):
        Swap(host, State.from_json(world.file), Limits(start=900, drain=20, hold=60), lambda phase, traffic: None).present(wish("new", strategy))
    assert world.clock - started < 60
    check_serves(world, "old")


def test_side_by_side_a_model_may_load_for_long() -> None:
    world = serving()
    host = FakeHost(world, fate={"new": "slow"})
    with pytest.raises(SwapError, match="not ready after 900 seconds"):
        Swap(host, State.from_json(world.file), Limits(start=900, drain=20, hold=60), lambda phase, traffic: None).present(wish("new"))


def test_a_busy_model_that_is_late_with_an_answer_is_not_taken_for_dead() -> None:
    world = serving(ONE_GPU)
    host = FakeHost(world)
    host.late = {"blue": 2}
    host.requests = {"blue": 50}
    Swap(host, State.from_json(world.file), Limits(60, 20), lambda phase, traffic: None).present(wish("new", "sleep"))
    assert "sleep blue" in host.names
    check_serves(world, "new")


def test_requests_of_the_standby_are_not_cut_off_by_the_next_swap() -> None:
    world = serving()
    host = FakeHost(world)
    host.requests = {"blue": 10_000}
    Swap(host, State.from_json(world.file), Limits(60, 20), lambda phase, traffic: None).present(wish("new"))
    for third in (wish("third"), None):
        host.names.clear()
        swap = Swap(host, State.from_json(world.file), Limits(60, 20), lambda phase, traffic: None)
        with pytest.raises(SwapError, match=r"requests of old \(blue\) were not finished"):
            swap.present(third) if third else swap.prune()
        assert not {"stop blue", "remove blue"} & set(host.names)
        check_serves(world, "new")


def test_a_process_that_was_restarted_has_not_slept() -> None:
    world = serving(ONE_GPU)
    present(world, wish("new", "sleep"))
    present(world, wish("old", "sleep"))
    present(world, wish("new", "sleep"))
    world.containers["green"].update(born="another")
    _, host = run(world, lambda swap: swap.rollback())
    assert "stop green" in host.names
    assert "sleep green" not in host.names


def reboot(world: World) -> None:
    """Only what systemd starts runs, and it takes a while. The gateway begins with what was kept."""
    world.route = world.kept
    for name, container in world.containers.items():
        container.pop("sleeps_at", None)
        container.update(asleep=False, running=name in world.enabled, ready_at=world.clock + 5, born=f"boot {world.clock}")


@pytest.mark.parametrize(("memory", "strategy"), WAYS)
def test_rebooted_anywhere_the_watchdog_has_a_model_serve(memory: int, strategy: str) -> None:
    world = prepared(memory, strategy, "swap")
    _, host = present(world, wish("new", strategy))
    for step in range(len(host.names)):
        for before in (True, False):
            world = prepared(memory, strategy, "swap")
            with pytest.raises(Killed):
                present(world, wish("new", strategy), kill_at=step, before=before)
            reboot(world)
            # Both may start for a moment if it was cut off right between; systemd starts one again, and the GPU refuses the other.
            if memory == ONE_GPU and len(world.enabled) == 2:
                world.containers["blue"]["running"] = False
            run(world, lambda swap: swap.recover())
            state = State.from_json(world.file)
            if state.active:
                check_serves(world, state.slots[state.active].model)


def scenarios() -> list[Any]:
    """Every way, killed right before and right after every change that it makes."""
    found = []
    for memory, strategy in [(1000, "side_by_side"), (ONE_GPU, "sleep"), (ONE_GPU, "hold_and_recreate")]:
        for kind in ("swap", "bad", "rollback", "again"):
            world = prepared(memory, strategy, kind)
            host = FakeHost(world)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(FakeHost, "step", counted := counting(FakeHost.step))
                try:
                    operate(world, strategy, kind)
                except SwapError:
                    assert kind == "bad"
                steps = counted.count  # type: ignore[attr-defined]
            del host
            assert steps > 5
            found += [pytest.param(memory, strategy, kind, step, before, id=f"{strategy}-{kind}-{step}-{'before' if before else 'after'}")
                      for step in range(steps) for before in (True, False)]  # fmt: skip
    return found


def counting(step: Callable[..., None]) -> Callable[..., None]:
    def counted(*arguments: Any) -> None:
        counted.count += 1  # type: ignore[attr-defined]
        step(*arguments)

    counted.count = 0  # type: ignore[attr-defined]
    return counted


def prepared(memory: int, strategy: str, kind: str) -> World:
    world = serving(memory)
    if kind in ("rollback", "again"):
        present(world, wish("new", strategy))
    return world


def operate(world: World, strategy: str, kind: str, **how: Any) -> None:
    if kind == "rollback":
        run(world, lambda swap: swap.rollback(), **how)
    elif kind == "again":
        present(world, wish("old", strategy), **how)
    else:
        present(world, wish("new", strategy), fate={"new": "bad"} if kind == "bad" else {}, **how)


@pytest.mark.parametrize(("memory", "strategy", "kind", "step", "before"), scenarios())
def test_killed_anywhere_it_converges_when_repeated(memory: int, strategy: str, kind: str, step: int, before: bool) -> None:
    world = prepared(memory, strategy, kind)
    with pytest.raises(Killed):
        operate(world, strategy, kind, kill_at=step, before=before)
    state = State.from_json(world.file)
    # Users are held or met by a model that was judged, never by a third thing.
    assert world.route in (HOLD, "blue", "green")
    assert "new" not in world.answered or kind != "bad"
    if kind == "bad":
        with pytest.raises(SwapError, match="unfit"):
            operate(world, strategy, kind)
        return check_serves(world, "old")
    if kind == "rollback":
        # Once the flip is written down, a rollback has happened, and another one would go forward again.
        if state.slots[state.active].model == "old":
            run(world, lambda swap: swap.recover())
        else:
            operate(world, strategy, kind)
        return check_serves(world, "old")
    operate(world, strategy, kind)
    return check_serves(world, "new" if kind == "swap" else "old")


@pytest.mark.parametrize(("memory", "strategy", "kind", "step", "before"), scenarios())
def test_killed_anywhere_the_watchdog_has_a_model_serve(memory: int, strategy: str, kind: str, step: int, before: bool) -> None:
    """At once, while what was ordered may still be at work, and nobody repeats what was killed."""
    world = prepared(memory, strategy, kind)
    with pytest.raises(Killed):
        operate(world, strategy, kind, kill_at=step, before=before)
    run(world, lambda swap: swap.recover())
    state = State.from_json(world.file)
    if state.standby and state.standby not in world.containers:
        # Nobody needs the record of what was being removed, and the next run notices.
        with pytest.raises(SwapError, match="nothing to roll back to"):
            run(world, lambda swap: swap.rollback())
    check_serves(world, state.slots[state.active].model)
    assert "new" not in world.answered or kind != "bad"


@pytest.mark.parametrize("step", range(60))
def test_killed_while_it_recovers(step: int) -> None:
    """A second run may be killed as well."""
    world = serving(ONE_GPU)
    with pytest.raises(Killed):
        present(world, wish("new", "sleep"), kill_at=5)
    try:
        present(world, wish("new", "sleep"), kill_at=step)
    except Killed:
        present(world, wish("new", "sleep"))
    check_serves(world, "new")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"slots": {"red": {}}}', '{"slots": {}, "active": "red"}', '{"slots": {}, "active": "blue"}'])
def test_a_record_that_cannot_be_read(text: str) -> None:
    with pytest.raises(SwapError):
        State.from_json(text)


def test_a_record_of_another_version() -> None:
    """An upgrade, or a step back, must not make a host that serves unusable."""
    text = '{"slots": {"blue": {"model": "m", "digest": "d", "slept_before": true}}, "active": "blue", "more": 1}'
    assert State.from_json(text).slots["blue"].model == "m"


@pytest.mark.parametrize(("more", "port"), [([], 0), (["--nnodes", "2", "--master-port", "29512", "--headless"], 29512)])
def test_the_record_says_where_a_models_hosts_meet(more: list[str], port: int) -> None:
    world = World()
    present(world, Wish("shared", {"image": "vllm", "command": ["shared", *more]}))
    assert State.from_json(world.file).slots["blue"].port == port


def test_a_record_without_the_port_is_read_and_kept() -> None:
    """As versions wrote it that did not know it: nothing may be concluded from that."""
    world = serving()
    record = json.loads(world.file)
    del record["slots"]["blue"]["port"]
    world.file = json.dumps(record)
    assert State.from_json(world.file).slots["blue"].port is None
    present(world, wish("new"))
    check_serves(world, "new")
    slots = State.from_json(world.file).slots
    assert (slots["blue"].port, slots["green"].port) == (None, 0)


WAITING = ["sleep", "hold_and_recreate"]


@pytest.mark.parametrize("strategy", WAITING)
def test_a_model_is_imported_before_requests_are_held(strategy: str, ahead: bool) -> None:
    world = serving(ONE_GPU)
    _, host = present(world, wish("new", strategy))
    assert ("ahead green" in host.names) == ahead
    if ahead:
        assert host.names.index("ahead green") < host.names.index("route hold") < host.names.index("start green")
    check_serves(world, "new")


def test_side_by_side_nothing_waits() -> None:
    world = serving()
    _, host = present(world, wish("new"))
    assert not [name for name in host.names if name.startswith("ahead")]


@pytest.mark.parametrize("fate", ["imports slowly", "cannot import"])
@pytest.mark.parametrize("strategy", WAITING)
def test_what_cannot_be_imported_costs_no_request_a_second(strategy: str, fate: str, ahead: bool) -> None:
    if not ahead:
        return
    world = serving(ONE_GPU)
    host = FakeHost(world, fate={"new": fate})
    with pytest.raises(SwapError, match="was not ready after 60 seconds" if fate == "imports slowly" else "ended while it was starting"):
        Swap(host, State.from_json(world.file), Limits(start=60, drain=20), lambda phase, traffic: None).present(wish("new", strategy))
    assert "route hold" not in host.names
    check_serves(world, "old")


def test_a_stopped_model_is_imported_ahead_on_the_way_back_as_well(ahead: bool) -> None:
    world = serving(ONE_GPU)
    present(world, wish("new", "hold_and_recreate"))
    _, host = run(world, lambda swap: swap.rollback())
    assert ("ahead blue" in host.names) == ahead
    check_serves(world, "old")


def test_what_serves_pays_for_its_first_sleep_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "pins", True)
    world = serving(ONE_GPU)
    assert State.from_json(world.file).slots["blue"].slept == world.containers["blue"]["born"]
    present(world, wish("new", "sleep"))
    _, host = run(world, lambda swap: swap.rollback())
    # It never slept, and goes to sleep all the same: that is a matter of a moment.
    assert "sleep green" in host.names
    assert "stop green" not in host.names
    check_serves(world, "old")
    again, host = present(world, wish("old", "sleep"))
    assert not again.changed
    assert "pin blue" not in host.names


def test_a_restarted_server_pays_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "pins", True)
    world = serving(ONE_GPU)
    world.containers["blue"]["born"] = "after a crash"
    again, host = present(world, wish("old"))
    assert not again.changed
    assert host.names.count("pin blue") == 1
    assert State.from_json(world.file).slots["blue"].slept == "after a crash"


def test_a_server_without_sleep_mode_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "pins", True)
    _, host = present(World(), wish("old", sleep_mode=False))
    assert "pin blue" not in host.names


def test_a_server_that_was_left_waiting_is_let_go(ahead: bool) -> None:
    """The power went between the flip's last words and the gate: nobody else would ever open it."""
    if not ahead:
        return
    world = serving(ONE_GPU)
    world.containers["blue"].update(gate="shut", ready_at=1e9)
    present(world, wish("old"))
    check_serves(world, "old")
