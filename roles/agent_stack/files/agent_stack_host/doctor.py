"""What is looked at, what is wrong, and what to do."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from agent_stack_host import status
from agent_stack_host.ask import Config, Host, Unknown, ask_all

NETWORKS = ("data", "edge", "egress", "inference", "model", "monitor")
GIB = 1024**3


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `wrong` is empty if it is well, `unknown` says that there was no answer."""

    what: str
    wrong: str = ""
    remedy: str = ""
    unknown: bool = False


def examine(host: Host) -> list[Finding]:
    """Look at everything. What cannot be looked at is a finding, too."""
    found = status.report(host)
    asked: dict[str, Callable[[], Any]] = {
        "networks": lambda: host.program("docker", "network", "ls", "--format", "{{.Name}}").split(),
        "engine": lambda: json.loads(host.program("docker", "info", "--format", "{{json .LiveRestoreEnabled}}")),
        "clock": lambda: host.program("timedatectl", "show", "--property=NTPSynchronized", "--value").strip(),
    }
    if host.config.front:
        asked["configuration"] = lambda: host.program("nginx", "-t", "-q")
        asked["name"] = lambda: host.program("getent", "hosts", host.config.domain)
    answers = ask_all(asked)
    return [*_programs(answers), *_stack(found, host.config), *_service(found), *_room(found), *_files(host)]


def _programs(answers: dict[str, Any]) -> Iterator[Finding]:
    """The host's own programs."""

    def finding(name: str, what: str, wrong: Callable[[Any], str], remedy: str) -> Iterator[Finding]:
        if name not in answers:
            return
        answer = answers[name]
        # nginx and getent say by failing that something is wrong.
        if isinstance(answer, Unknown) and name not in ("configuration", "name"):
            yield Finding(what, str(answer), remedy, unknown=True)
        else:
            said = str(answer) if isinstance(answer, Unknown) else wrong(answer)
            yield Finding(what, said, remedy if said else "")

    yield from finding(
        *("engine", "containers survive a restart of the Docker engine"),
        lambda on: "" if on else "live-restore is off",
        "Apply the role docker again: site.yml --tags docker.",
    )
    yield from finding(
        *("networks", "the stack's networks are there"),
        lambda names: ", ".join(f"agent-stack-{name} is missing" for name in NETWORKS if f"agent-stack-{name}" not in names),
        "Apply the role docker again: site.yml --tags docker.",
    )
    yield from finding(
        *("clock", "the clock is set by the network"),
        lambda said: "" if said == "yes" else "systemd does not know that it is",
        "Install systemd-timesyncd or chrony: certificates and limits need the right time.",
    )
    yield from finding("configuration", "nginx takes its configuration", lambda _: "", "Apply the role nginx_certbot again, and read nginx -t.")
    yield from finding("name", "the host can look its own name up", lambda said: "" if said else "no answer", "Look at the DNS entry of agent_stack_domain.")


def _stack(found: dict[str, Any], config: Config) -> Iterator[Finding]:
    """Containers and units."""
    bad = {}
    for container in found["containers"] or []:
        if container["state"] != "running" or container["health"] not in ("healthy", "none"):
            bad[container["name"]] = f"{container['state']}, {container['health']}"
    containers = found["containers"]
    if containers is None:
        yield Finding("containers run and are healthy", found["unknown"].get("containers", "no answer"), "systemctl status docker", unknown=True)
    else:
        missing = set(found["expected"]) - {container["component"] for container in containers}
        said = [f"{name}: {state}" for name, state in bad.items()] + [f"{name} has none" for name in sorted(missing)]
        first = next(iter(bad), "")
        remedy = f"Read docker logs --tail 50 {first}, then systemctl restart agent-stack@COMPONENT." if first else "systemctl start agent-stack.target"
        yield Finding("containers run and are healthy", "; ".join(said), remedy if said else "")
        often = [f"{container['name']} {container['restarts']} times" for container in containers if container["restarts"] > 3]
        yield Finding("no container starts again and again", ", ".join(often), "Read its log: docker logs --tail 50 NAME." if often else "")
    failed = [unit for unit in found["units"] or [] if unit["state"] == "failed"]
    names = ", ".join(unit["name"] for unit in failed)
    remedy = f"Read journalctl -u {failed[0]['name']} -n 50, then systemctl reset-failed and start it." if failed else ""
    if found["units"] is None:
        yield Finding("no unit failed", found["unknown"].get("units", "no answer"), "systemctl status", unknown=True)
    else:
        yield Finding("no unit failed", names, remedy)
        stopped = [unit["name"] for unit in found["units"] if status.is_stopped(unit, config)]
        yield Finding("what starts on boot runs", ", ".join(stopped), f"systemctl start {' '.join(stopped)}" if stopped else "")


def _service(found: dict[str, Any]) -> Iterator[Finding]:
    """The way of a request, from the outside to the model."""
    model = found["model"]
    if model is None:
        yield Finding("a model serves", found["unknown"].get("model", "no record"), "Apply the role vllm: site.yml --tags vllm.", unknown=True)
    else:
        wrong = "" if model["serves"] else "no slot serves"
        yield Finding("a model serves", wrong, "Read journalctl -u agent-stack-vllm-watchdog, then site.yml --tags vllm." if wrong else "")
    if "nginx" not in found:
        return
    nginx = "" if found["nginx"] == 200 else found["unknown"].get("door", f"/health is answered with {found['nginx']}")
    yield Finding("nginx reaches the agent", nginx, "systemctl status nginx; then /var/log/nginx/error.log." if nginx else "")
    ready = found["ready"]
    if ready is None:
        yield Finding("the agent has all that a turn needs", found["unknown"].get("ready", "no answer"), "docker logs --tail 50 agent-stack-agent-agent-1")
    else:
        lacks = "" if ready["ready"] else f"it lacks {', '.join(ready['not_ready'])}"
        yield Finding("the agent has all that a turn needs", lacks, "Look at what it lacks first: agent-stack status." if lacks else "")
    certificate = found["certificate"]
    if certificate is not None:
        soon = certificate["days"] < status.CERTIFICATE_DAYS
        said = f"it ends in {certificate['days']} days" if soon else ""
        yield Finding("the certificate counts for long enough", said, "Run certbot renew, and read /var/log/letsencrypt/letsencrypt.log." if soon else "")
    if "alerts" not in found:
        return
    if found["alerts"] is None:
        yield Finding("no alert fires", found["unknown"].get("alerts", "no answer"), "systemctl restart agent-stack@monitoring", unknown=True)
    else:
        firing = ", ".join(f"{alert['name']} since {alert['since'][:19]}Z" for alert in found["alerts"])
        yield Finding("no alert fires", firing, "Each alert's description says what to do." if firing else "")


def _room(found: dict[str, Any]) -> Iterator[Finding]:
    for disk in found["disks"] or []:
        share = disk["free_bytes"] / disk["size_bytes"]
        said = f"{disk['free_bytes'] / GIB:.1f} GiB ({share:.0%}) are left" if share < status.DISK_FREE_RATIO else ""
        yield Finding(f"{disk['path']} has room", said, "playbooks/clean.yml --check says what can go." if said else "")


def _files(host: Host) -> Iterator[Finding]:
    """Secrets that others could read."""
    open_ones = []
    for directory in sorted(host.config.root.glob("*/secrets")):
        open_ones += [str(file) for file in sorted(directory.rglob("*")) if file.is_file() and file.stat().st_mode & 0o077]
    yield Finding("secrets are readable by their container alone", ", ".join(open_ones), "Apply the play again: it sets owner and mode." if open_ones else "")
