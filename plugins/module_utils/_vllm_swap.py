# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""Changing the model that serves, step by step, with no request lost. PRIVATE to the collection: it may change at any time.

Two slots, blue and green, each a server of its own. One serves; the other is where the next model starts, and where the last one waits for a rollback.
Everything that touches the host goes through `Host`, so that the order of steps, which is all that is here, can be tested by killing it at each of them.

Before the flip is written down, a swap that ends early is undone: whoever comes next restores the slot that serves. After it, a swap is finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

SLOTS = ("blue", "green")
STRATEGIES = ("side_by_side", "sleep", "hold_and_recreate")
HOLD = "hold"
FALLING_ASLEEP = "falling asleep"
# What a sleeping model takes to answer again, with room: seconds.
BACK_SECONDS = 15


class SwapError(Exception):
    """Why a swap did not happen; the message is for the user."""


@dataclass
class Slot:
    """What is in a slot. `condition` is serving, starting, running, falling asleep, asleep or stopped; `proven` what has served before.

    `port` is where other hosts that share the model meet this one: 0 if there are none. `cache` is the host's directory of what the server compiles, or
    nothing. Both are None in a record of a version that did not write them down.
    """

    model: str
    digest: str
    weights_mib: int = 0
    utilization: float = 0.0
    sleep_mode: bool = False
    condition: str = "starting"
    # The first sleep of a process takes long, if it was not paid for before; this is the process (`Host.born`) whose next one is fast, if it is still the same.
    slept: str = ""
    load_seconds: float = 0.0
    proven: bool = False
    since: float = 0.0
    port: int | None = None
    cache: str | None = None


@dataclass
class State:
    """What is kept between runs. `active` serves, `target` is what a swap under way leads to, `strategy` how the two slots share the GPU."""

    active: str = ""
    target: str = ""
    strategy: str = ""
    slots: dict[str, Slot] = field(default_factory=dict)

    @property
    def standby(self) -> str:
        """The slot that does not serve, if something is in it."""
        return next((name for name in self.slots if name != self.active), "")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> State:
        """Raises SwapError for a file that no run of this can have written. What another version added is left out."""
        try:
            data = json.loads(text)
            slots = {name: Slot(**_known(Slot, slot)) for name, slot in data.pop("slots").items()}
            state = cls(slots=slots, **_known(cls, data))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SwapError(f"the record of the slots cannot be read: {error}") from error
        if any(name not in SLOTS for name in [*slots, *filter(None, (state.active, state.target))]):
            raise SwapError("the record of the slots names others than blue and green")
        if state.active and state.active not in slots:
            raise SwapError(f"the record of the slots says that {state.active} serves, and nothing of what is in it")
        return state


@dataclass(frozen=True)
class Wish:
    """The model that shall serve. `definition` is its Compose service; `sleep_mode` whether the servers can be put to sleep."""

    model: str
    definition: dict[str, Any]
    strategy: str = "side_by_side"
    weights_mib: int = 0
    utilization: float = 0.0
    beside_utilization: float = 0.0
    sleep_mode: bool = False

    @property
    def digest(self) -> str:
        """Tells two wishes apart. Where the new model is started does not count."""
        return hashlib.sha256(json.dumps(self.definition, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def port(self) -> int:
        """Where the other hosts of the model meet this one, or 0."""
        command = self.definition["command"]
        return int(command[command.index("--master-port") + 1]) if "--master-port" in command else 0

    @property
    def cache(self) -> str:
        """The host's directory of what the server compiles, or nothing."""
        mounts = [str(volume).partition(":") for volume in self.definition.get("volumes", [])]
        return next((parts[0] for parts in mounts if parts[2] == "/cache"), "")

    def definition_for(self, strategy: str) -> dict[str, Any]:
        """Return the service as it is started: beside another model it gets only the share of the memory that is left."""
        if strategy != "side_by_side" or not self.beside_utilization:
            return self.definition
        command = list(self.definition["command"])
        if "--gpu-memory-utilization" in command:
            command[command.index("--gpu-memory-utilization") + 1] = f"{self.beside_utilization:g}"
        return self.definition | {"command": command}


@dataclass(frozen=True)
class Limits:
    """Seconds: until a model answers, until running requests have ended, and for which the gateway holds requests."""

    start: float = 900
    drain: float = 120
    hold: float = 300


@dataclass(frozen=True)
class Traffic:
    """Requests that wait at the gateway now, and those that failed there since it started."""

    held: int
    failed: int


class Host(Protocol):
    """What a swap does to the host. Each call may be the last one before the power goes, and may be repeated."""

    def now(self) -> float: ...
    def pause(self, seconds: float) -> None: ...
    def save(self, state: State) -> None: ...

    def status(self, slot: str) -> str:
        """Return absent, stopped or running. A slot whose container was removed, and can be made again, is stopped."""

    def born(self, slot: str) -> str:
        """Return what tells this run of the slot's process from any other."""

    def check(self) -> None:
        """Raise SwapError if the host cannot start a model at all, because its GPU is away."""

    def create(self, slot: str, definition: dict[str, Any]) -> None:
        """Write the slot's Compose project and create its container, such that a crash ends it."""

    def start(self, slot: str) -> None:
        """Start the slot's server, or let one that waits for the GPU go on."""

    def start_ahead(self, slot: str) -> bool:
        """Start the slot's server such that it does what needs no GPU and then waits for `start`. Return whether it can; if not, nothing is done."""

    def waits(self, slot: str) -> bool:
        """Whether the slot's server waits for `start`, or is on the way there."""

    def imported(self, slot: str) -> bool:
        """Whether a server that was started ahead has done all that it can."""

    def stop(self, slot: str, *, at_once: bool) -> None: ...
    def remove(self, slot: str) -> None: ...

    def log(self, slot: str) -> str:
        """Return why the slot's server ended, as far as its log tells, with a heading."""

    def ready(self, slot: str) -> bool:
        """Whether the server answers its health check."""

    def asleep(self, slot: str) -> bool: ...
    def sleep(self, slot: str) -> None: ...

    def pin(self, slot: str, weights_mib: int) -> bool:
        """Have a serving slot pay now what would make its first sleep slow. Return whether its next sleep is a fast one."""

    def wake(self, slot: str) -> None: ...

    def busy(self, slot: str) -> int:
        """Return how many requests the slot still has."""

    def judge(self, slot: str, *, briefly: bool) -> list[str]:
        """Return the reasons why users should not meet the slot."""

    def route(self, to: str) -> bool:
        """Send new requests to a slot, or hold them. Return whether that is a change."""

    def keep_route(self, slot: str) -> bool:
        """Have a restarted gateway send requests to this slot."""

    def promote(self, slot: str) -> bool:
        """Have the slot restarted when it crashes and started on boot."""

    def demote(self, slot: str) -> bool: ...
    def traffic(self) -> Traffic: ...


Report = Callable[[str, Traffic], None]


class Swap:
    """One run. `changed` says whether anything was done."""

    def __init__(self, host: Host, state: State, limits: Limits, report: Report) -> None:
        self.host = host
        self.state = state
        self.limits = limits
        self.report = report
        self.changed = False
        self.held_seconds = 0.0
        self.held = 0
        self._held_since: float | None = None
        self._way_back = False

    # ------------------------------------------------------------------------------------------------------------ what users ask for

    def present(self, wish: Wish) -> None:
        """Have the wished model serve. Raises SwapError; what served before then serves on."""
        self._present(wish)
        self._pin(self.state.active)

    def _present(self, wish: Wish) -> None:
        self.recover()
        state = self.state
        if not state.active:
            return self._first(wish)
        if state.slots[state.active].digest == wish.digest:
            return self._keep(wish)
        target = _other(state.active)
        standby = state.slots.get(target)
        if standby and standby.digest == wish.digest and self.host.status(target) == "running":
            return self._change(target, state.strategy, None)
        if standby:
            self._clear(target)
        return self._change(target, wish.strategy, wish)

    def rollback(self) -> None:
        """Have the model serve that served before. Raises SwapError."""
        self.recover()
        standby = self.state.standby
        if standby and self.host.status(standby) == "absent":
            # Removed by a run that was cut off before it wrote that down.
            self._drop(standby)
            standby = ""
        if not standby:
            raise SwapError("there is nothing to roll back to: only one model is there")
        self._change(standby, self.state.strategy, None, back=True)
        self._pin(self.state.active)

    def prune(self) -> None:
        """Remove the model that waits for a rollback."""
        self.recover()
        if self.state.standby:
            self._clear(self.state.standby)

    def recover(self) -> None:
        """End what another run left half done: before its flip was written down it is undone, after it finished.

        A model that does not come back is no error here: requests are held, and whoever asked can still have another one serve.
        """
        state = self.state
        if not state.target:
            return
        self._tell("recover")
        if state.target == state.active:
            self._finish()
        else:
            self._undo()

    # ------------------------------------------------------------------------------------------------------------ the ways there

    def _first(self, wish: Wish) -> None:
        self._begin("blue", "", wish)
        with self._undone_if_it_fails():
            self.host.create("blue", wish.definition)
            self._bring_up("blue")
        self._flip("blue")

    def _keep(self, wish: Wish) -> None:
        active = self.state.active
        if self.host.status(active) == "absent":
            self.host.create(active, wish.definition)
        if not self._fit(active):
            self._tell("start")
            self._restore(active)
        # Each says whether there was something to do: on a host where all is well there is not.
        done = [self.host.keep_route(active), self.host.route(active), self.host.promote(active)]
        self.changed = self.changed or any(done)

    def _change(self, target: str, strategy: str, wish: Wish | None, *, back: bool = False) -> None:
        active = self.state.active
        self._way_back = self._fit(active)
        if not self._way_back:
            # Nothing answers, so there is nothing to drain, and no memory to share.
            strategy = "hold_and_recreate"
        self._begin(target, strategy, wish)
        with self._undone_if_it_fails():
            # Whatever needs no memory of the GPU comes before requests are held.
            self.host.check()
            if wish:
                self._tell("create")
                self.host.create(target, wish.definition_for(strategy))
            if strategy != "side_by_side":
                self._start_ahead(target)
                self._hold()
                self._drain(active)
                self._quiet(active, strategy, at_once=back)
            self._bring_up(target, briefly=back)
        self._flip(target)

    @contextlib.contextmanager
    def _undone_if_it_fails(self) -> Iterator[None]:
        """Requests may be held, so whatever goes wrong, what served before must serve again. Raises SwapError."""
        try:
            yield
        except Exception as error:
            why = str(error) if isinstance(error, SwapError) else f"{type(error).__name__}: {error}"
            second = self._undo()
            raise SwapError(f"{why}\nWhat served before does not come back either: {second}" if second else why) from error

    def _begin(self, target: str, strategy: str, wish: Wish | None) -> None:
        self.changed = True
        state = self.state
        state.target, state.strategy = target, strategy
        if wish:
            share = wish.beside_utilization if strategy == "side_by_side" else wish.utilization
            state.slots[target] = Slot(
                wish.model,
                wish.digest,
                wish.weights_mib,
                share or wish.utilization,
                wish.sleep_mode,
                since=self.host.now(),
                port=wish.port,
                cache=wish.cache,
            )
        self.host.save(state)

    def _start_ahead(self, slot: str) -> None:
        """Have the slot's server do what needs no GPU, while the other one serves. Raises SwapError with the server's last words."""
        host = self.host
        if host.status(slot) == "running" or not host.start_ahead(slot):
            return
        deadline = host.now() + self.limits.start
        while not host.imported(slot):
            self._check_starts(slot, deadline)
            self._tell("import")
            host.pause(0.1)

    def _bring_up(self, slot: str, *, briefly: bool = False) -> None:
        """Start or wake a slot and judge it. Raises SwapError with the server's last words."""
        host = self.host
        if host.status(slot) != "running" or host.waits(slot):
            self._tell("start")
            begun = host.now()
            host.start(slot)
            self._wait_until_ready(slot)
            self.state.slots[slot].load_seconds = round(host.now() - begun, 1)
        self._wait_until_ready(slot)
        if host.asleep(slot):
            self._tell("wake")
            host.wake(slot)
        self._tell("judge")
        reasons = host.judge(slot, briefly=briefly)
        if reasons:
            raise SwapError(f"{self._name(slot)} was judged unfit: {'; '.join(reasons)}.\n{host.log(slot)}")

    def _wait_until_ready(self, slot: str) -> None:
        deadline = self.host.now() + self.limits.start
        while not self.host.ready(slot):
            self._check_starts(slot, deadline)
            self._held_too_long(slot)
            self._tell("load")
            self.host.pause(0.5)

    def _check_starts(self, slot: str, deadline: float) -> None:
        if self.host.status(slot) != "running":
            raise SwapError(f"{self._name(slot)} ended while it was starting.\n{self.host.log(slot)}")
        if self.host.now() > deadline:
            raise SwapError(f"{self._name(slot)} was not ready after {self.limits.start:g} seconds.\n{self.host.log(slot)}")

    def _flip(self, target: str) -> None:
        """From here on the target is what serves, whatever happens."""
        state = self.state
        state.active = target
        self.host.save(state)
        self._finish()
        if state.active != target:
            raise SwapError("the new model was judged fit, and ended before it could serve; what served before serves on")

    def _finish(self) -> None:
        """Have the target serve and the other slot wait. Every step may have been done before."""
        state, host = self.state, self.host
        target, other = state.active, state.standby
        self.changed = True
        if not self._fit(target):
            # Only after an interruption: the host was restarted, or someone stopped it.
            try:
                if other and state.strategy != "side_by_side" and host.status(other) == "running" and not host.asleep(other):
                    self._hold()
                    self._drain(other)
                    self._quiet(other, state.strategy, at_once=True)
                self._restore(target)
            except SwapError:
                if not other:
                    self._released()
                    state.target = ""
                    return host.save(state)
                # It served for a moment at most. The other one is known to be good.
                state.active, state.target = other, target
                host.save(state)
                self._undo()
                return None
        self._tell("flip")
        # First of all: after a reboot in between, what the gateway names must start.
        host.promote(target)
        host.keep_route(target)
        host.route(target)
        self._released()
        state.slots[target].condition = "serving"
        state.slots[target].proven = True
        if other:
            self._settle(other)
        state.target = ""
        return host.save(state)

    def _settle(self, slot: str) -> None:
        """Let the slot that served end its requests, then wait for a rollback."""
        host, entry = self.host, self.state.slots[slot]
        host.demote(slot)
        entry.since = host.now()
        if host.status(slot) != "running":
            entry.condition = "stopped"
            return
        try:
            self._drain(slot)
        except SwapError:
            # Its requests may take as long as they like: nobody waits for them.
            entry.condition = "running"
            return
        if self._can_sleep(slot) and not host.asleep(slot):
            self._tell("sleep")
            try:
                host.sleep(slot)
                entry.slept = host.born(slot)
            except SwapError:
                host.stop(slot, at_once=True)
        entry.condition = "stopped" if host.status(slot) != "running" else "asleep" if host.asleep(slot) else "running"

    def _undo(self) -> str:
        """Have what served before serve on, and forget the target. Return why it does not serve, or nothing.

        Whatever happens, the record says afterwards that no swap is under way, so that the next run can do something else.
        """
        state, host = self.state, self.host
        target, active = state.target, state.active
        failure = ""
        # It takes as long as it takes: there is nothing else to go back to.
        self._way_back = False
        self._tell("undo")
        if active and host.status(active) == "absent":
            # Someone removed it, so there is nothing to go back to, and the gateway holds requests until a model is there.
            state.slots.pop(active)
            state.active = ""
        elif active:
            try:
                if not host.asleep(target):
                    host.stop(target, at_once=True)
                self._restore(active)
                host.promote(active)
                host.keep_route(active)
                host.route(active)
                state.slots[active].condition = "serving"
            except (SwapError, OSError) as error:
                failure = str(error)
            self._released()
        entry = state.slots.get(target)
        if not state.active or not entry or not entry.proven:
            self._drop(target)
            return failure
        # It was on its way back, and may be asked to come back again.
        host.demote(target)
        entry.condition = "asleep" if host.asleep(target) else "stopped"
        state.target = ""
        host.save(state)
        return failure

    def _clear(self, slot: str) -> None:
        """Remove what waits for a rollback, once it has ended its requests. Raises SwapError."""
        self._drain(slot)
        self._tell("remove")
        self._drop(slot)

    def _drop(self, slot: str) -> None:
        self.changed = True
        self.host.demote(slot)
        self.host.remove(slot)
        self.state.slots.pop(slot, None)
        if self.state.target == slot:
            self.state.target = ""
        self.host.save(self.state)

    # ------------------------------------------------------------------------------------------------------------ single steps

    def _fit(self, slot: str) -> bool:
        """Whether a slot answers. One that runs and is late with one answer is busy, not broken."""
        for _attempt in range(3):
            if self.host.status(slot) != "running":
                return False
            if self.host.ready(slot):
                return not self.host.asleep(slot)
            self.host.pause(1)
        return False

    def _restore(self, slot: str) -> None:
        """Have a slot answer that did before, from whatever state it is in."""
        self.changed = True
        host = self.host
        if host.status(slot) == "absent":
            raise SwapError(f"{self._name(slot)} is not there any more")
        if host.status(slot) == "stopped" or host.waits(slot):
            host.start(slot)
        self._wait_until_ready(slot)
        entry = self.state.slots[slot]
        if entry.condition == FALLING_ASLEEP and entry.slept == host.born(slot) and not host.asleep(slot):
            # It may be asleep in a moment: the order of a run that was cut off can still be at work. Engines take one order after the other, so that
            # once this one is done, or refused, that one is.
            self._tell("sleep")
            with contextlib.suppress(Exception):
                host.sleep(slot)
        if host.asleep(slot):
            self._tell("wake")
            host.wake(slot)

    def _hold(self) -> None:
        self._tell("hold")
        if self._held_since is None:
            self._held_since = self.host.now()
        # A gateway that is restarted meanwhile must not send requests to a model that sleeps.
        self.host.keep_route(HOLD)
        self.host.route(HOLD)

    def _released(self) -> None:
        if self._held_since is not None:
            self.held = max(self.held, self.host.traffic().held)
            self.held_seconds += self.host.now() - self._held_since
            self._held_since = None

    def _held_too_long(self, slot: str) -> None:
        """Raise SwapError as long as there is time to have the old model back before the gateway gives requests up."""
        if self._held_since is None or not self._way_back:
            return
        active = self.state.slots[self.state.active]
        back = BACK_SECONDS + (active.load_seconds if active.condition == "stopped" else 0)
        longest = max(self.limits.hold - back, self.limits.hold / 2)
        if self.host.now() - self._held_since > longest:
            raise SwapError(
                f"requests had been held for {longest:g} seconds, and {self._name(slot)} did not answer yet; the gateway holds them for"
                f" {self.limits.hold:g} (vllm_hold_seconds).\n{self.host.log(slot)}"
            )

    def _drain(self, slot: str) -> None:
        """Wait for the slot's requests. Raises SwapError when they take too long: none is cut off."""
        deadline = self.host.now() + self.limits.drain
        while self.host.status(slot) == "running" and (busy := self.host.busy(slot)):
            if self.host.now() > deadline:
                raise SwapError(f"{busy} requests of {self._name(slot)} were not finished after {self.limits.drain:g} seconds")
            self._tell("drain")
            self.host.pause(0.1)

    def _quiet(self, slot: str, strategy: str, *, at_once: bool) -> None:
        """Have a drained slot give its memory back. The first sleep takes long, so on the way back from a bad model it is stopped instead."""
        entry = self.state.slots[slot]
        born = self.host.born(slot)
        if strategy == "sleep" and self._can_sleep(slot) and (entry.slept == born or not at_once):
            self._tell("sleep")
            if not self.host.asleep(slot):
                entry.slept, entry.condition = born, FALLING_ASLEEP
                self.host.save(self.state)
                self.host.sleep(slot)
            entry.slept, entry.condition = born, "asleep"
        else:
            self._tell("stop")
            self.host.stop(slot, at_once=at_once)
            entry.condition = "stopped"
        self.host.save(self.state)

    def _pin(self, slot: str) -> None:
        """Have what serves now pay for its first sleep, so that no request is held for that later."""
        entry, born = self.state.slots[slot], self.host.born(slot)
        if not entry.sleep_mode or entry.slept == born:
            return
        self._tell("pin")
        if self.host.pin(slot, entry.weights_mib):
            entry.slept = born
            self.host.save(self.state)

    def _can_sleep(self, slot: str) -> bool:
        return self.state.strategy != "hold_and_recreate" and self.host.status(slot) == "running" and self.state.slots[slot].sleep_mode

    def _name(self, slot: str) -> str:
        entry = self.state.slots.get(slot)
        return f"{entry.model} ({slot})" if entry else slot

    def _tell(self, phase: str) -> None:
        traffic = self.host.traffic()
        if self._held_since is not None:
            self.held = max(self.held, traffic.held)
        self.report(phase, traffic)


def unused_caches(found: Iterable[str], slots: Iterable[Slot]) -> list[str]:
    """Return which of the caches that were found no slot uses. None where it is not written down what a slot uses, or nothing is in the slots."""
    used = [slot.cache for slot in slots]
    return [] if not used or None in used else [path for path in found if path not in used]


def _known(of: type, data: dict[str, Any]) -> dict[str, Any]:
    names = {entry.name for entry in fields(of)}
    return {name: value for name, value in data.items() if name in names}


def _other(slot: str) -> str:
    return SLOTS[1 - SLOTS.index(slot)]
