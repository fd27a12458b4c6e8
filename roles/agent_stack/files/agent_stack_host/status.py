"""How the stack is: everything asked at once, and what follows from it. The screen and `--json` say the same."""

import calendar
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from agent_stack_host.ask import Config, Host, Unknown, ask_all

# The exit codes. Down: nobody is answered. Degraded: somebody has to look.
EXIT = {"ok": 0, "degraded": 1, "down": 2}
CERTIFICATE_DAYS = 14
DISK_FREE_RATIO = 0.1
BACKUP_HOURS = 36
DRILL_DAYS = 8
BACKUP = "agent_stack_backup_"
# Expressions for Prometheus. Those of the agent are over five minutes, or there would be gaps at few requests.
TRAFFIC = {
    "requests_per_minute": 'sum(rate(agent_http_requests_total{route=~"/chat.*|/threads.*|/runs.*|/openai.*"}[5m])) * 60',
    "errors_per_minute": 'sum(rate(agent_http_requests_total{status=~"5.."}[5m])) * 60',
    "turns_per_minute": "sum(rate(agent_turns_total[5m])) * 60",
    "turns_running": "sum(agent_turns_running)",
    "turns_pending": 'sum(agent_runs{status="pending"})',
    "turn_p50_seconds": "histogram_quantile(0.5, sum by (le) (rate(agent_turn_duration_seconds_bucket[5m])))",
    "turn_p95_seconds": "histogram_quantile(0.95, sum by (le) (rate(agent_turn_duration_seconds_bucket[5m])))",
    "model_running": "sum(vllm:num_requests_running)",
    "model_waiting": "sum(vllm:num_requests_waiting)",
    "model_kv_cache_ratio": "max(vllm:kv_cache_usage_perc)",
    "model_tokens_per_second": "sum(rate(vllm:generation_tokens_total[5m]))",
    "model_p50_seconds": "histogram_quantile(0.5, sum by (le) (rate(vllm:e2e_request_latency_seconds_bucket[5m])))",
    "model_p95_seconds": "histogram_quantile(0.95, sum by (le) (rate(vllm:e2e_request_latency_seconds_bucket[5m])))",
}
UNIT_FIELDS = ("Id", "LoadState", "ActiveState", "SubState", "Result", "UnitFileState")
# Beside the stack's own units.
UNITS = ("docker.service", "nginx.service", "certbot.timer", "logrotate.timer")
KEYS = (
    "SELECT coalesce(json_agg(json_build_object('name', name, 'created', extract(epoch FROM created_at)::bigint,"
    " 'last_used', extract(epoch FROM last_used)::bigint) ORDER BY name), '[]') FROM api_keys WHERE revoked_at IS NULL"
)
GPU_FIELDS = ("name", "memory.used", "memory.total", "utilization.gpu")


def containers(host: Host) -> list[dict[str, Any]]:
    """Return the stack's containers, stopped ones included. One that ended well is a step of a play, and left out."""
    listed = host.program("docker", "ps", "--all", "--quiet", "--no-trunc", "--filter", "label=com.docker.compose.project").split()
    if not listed:
        return []
    found = []
    for item in json.loads(host.program("docker", "inspect", *listed)):
        labels, state = item["Config"]["Labels"], item["State"]
        project = labels["com.docker.compose.project"]
        if not project.startswith("agent-stack-") or labels.get("com.docker.compose.oneoff") == "True":
            continue
        found.append(
            {
                "name": item["Name"].lstrip("/"),
                "component": project.removeprefix("agent-stack-"),
                "state": state["Status"],
                "health": state.get("Health", {}).get("Status", "none"),
                "restarts": item["RestartCount"],
                "started": state["StartedAt"],
                "image": item["Config"]["Image"],
            }
        )
    return sorted(found, key=lambda container: str(container["name"]))


def units(host: Host) -> list[dict[str, str]]:
    """Return the stack's units and those that it stands on, as systemd has them, without those that only a timer or a socket starts and that now rest."""
    # Without --all a pattern finds no unit that is stopped.
    said = host.program("systemctl", "show", "--all", f"--property={','.join(UNIT_FIELDS)}", "agent-stack*", *UNITS)
    every = [dict(line.partition("=")[::2] for line in block.splitlines()) for block in said.split("\n\n") if block.strip()]
    # Slices and targets run nothing themselves, and have no result.
    blocks = [block for block in every if not block["Id"].endswith((".slice", ".target"))]
    return [
        {"name": block["Id"], "state": block["ActiveState"], "sub": block["SubState"], "result": block["Result"], "boot": block["UnitFileState"]}
        for block in sorted(blocks, key=lambda block: block["Id"])
        if block["LoadState"] == "loaded" and (block["ActiveState"] != "inactive" or block["UnitFileState"] == "enabled")
    ]


def expected(config: Config, slash: Path) -> list[str]:
    """Return the components that systemd starts on boot, without a model that waits for a rollback."""
    wants = slash / "etc/systemd/system/agent-stack.target.wants"
    names = [path.name.removeprefix("agent-stack@").removesuffix(".service") for path in wants.glob("agent-stack@*.service")] if wants.is_dir() else []
    return sorted(name for name in names if not (config.root / name / "standby").exists())


def model(host: Host) -> dict[str, Any]:
    """Return which slot serves, and what is in each."""
    found = json.loads(host.read(host.config.data / "vllm" / "swap.json"))
    kept = ("model", "condition", "since")
    return {"serves": found["active"], "slots": {name: {key: slot.get(key) for key in kept} for name, slot in sorted(found["slots"].items())}}


def certificate(host: Host, pem: str) -> dict[str, Any]:
    """Return until when the certificate counts that nginx shows, and whose it is."""
    said = host.program("openssl", "x509", "-noout", "-enddate", "-issuer", "-nameopt", "RFC2253,sep_comma_plus_space", stdin=pem)
    fields = dict(line.partition("=")[::2] for line in said.splitlines())
    # In C's words, whatever the user's language is: Feb 25 21:04:11 2027 GMT.
    months = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
    month, day, clock, year, _zone = fields["notAfter"].split()
    date = f"{year}-{months.index(month) + 1:02}-{int(day):02}"
    left = calendar.timegm(time.strptime(f"{date}T{clock}", "%Y-%m-%dT%H:%M:%S")) - time.time()
    return {"not_after": f"{date}T{clock}Z", "days": int(left // 86400), "issuer": fields["issuer"].strip()}


def gpus(host: Host) -> list[dict[str, Any]]:
    said = host.program("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits")
    rows = [[part.strip() for part in line.split(",")] for line in said.splitlines() if line.strip()]
    # MIG and some cards say [N/A] for what they do not measure.
    numbers = [[int(part) if part.isdecimal() else None for part in row[1:]] for row in rows]
    return [{"name": row[0], "used_mib": used, "total_mib": total, "busy_percent": busy} for row, (used, total, busy) in zip(rows, numbers, strict=True)]


def disks(host: Host) -> list[dict[str, Any]]:
    """Return the room of each file system that the stack writes to, once each."""
    found: dict[int, dict[str, Any]] = {}
    for path in (host.config.data, host.config.data / "models", host.config.data / "postgres", host.slash / "var/lib/docker", host.slash):
        try:
            device, usage = path.stat().st_dev, shutil.disk_usage(path)
        except OSError:
            continue
        found.setdefault(device, {"path": str(path), "free_bytes": usage.free, "size_bytes": usage.total})
    return list(found.values())


def alerts(host: Host) -> list[dict[str, str]]:
    """Return the alerts that fire, but for the heartbeat."""
    status, found = host.http("prometheus", "/api/v1/alerts")
    if status != 200 or not isinstance(found, dict):
        raise Unknown(f"Prometheus answers {status}")
    firing = [alert for alert in found["data"]["alerts"] if alert["state"] == "firing" and alert["labels"].get("severity") != "none"]
    rows = [
        {
            "name": alert["labels"]["alertname"],
            "severity": alert["labels"].get("severity", ""),
            "since": alert["activeAt"],
            "summary": alert["annotations"].get("summary", ""),
        }
        for alert in firing
    ]
    return sorted(rows, key=lambda row: (row["severity"], row["name"]))


def keys(host: Host) -> list[dict[str, Any]]:
    """Return the API keys that open the service, and when each was last used, in seconds since 1970."""
    command = ("psql", "--no-psqlrc", "--tuples-only", "--no-align", "--host=/var/run/postgresql", "--username=postgres", "--dbname=agent")
    found: list[dict[str, Any]] = json.loads(host.program("docker", "exec", "agent-stack-postgres-postgres-1", *command, f"--command={KEYS}"))
    return found


def backup(host: Host) -> dict[str, Any]:
    """Return what backups write for Prometheus, by name, read where it lies, so that Prometheus may be away. `last` and `last_drill` are times."""
    found: dict[str, float] = {}
    directory = host.config.data / "textfile"
    for file in sorted(directory.glob("*.prom")) if directory.is_dir() else []:
        for line in host.read(file).splitlines():
            name, _sep, value = line.rpartition(" ")
            if name.startswith(BACKUP):
                found[name.removeprefix(BACKUP)] = float(value)
    # One of each type: full, diff.
    ended = [value for name, value in found.items() if name.partition("{")[0] == "last_timestamp_seconds" and value > 0]
    return {
        "metrics": found,
        "last": max(ended, default=None),
        "last_drill": found.get("drill_timestamp_seconds") or None,
        "drill_success": bool(found["drill_success"]) if found.get("drill_timestamp_seconds") else None,
        "repository_up": bool(found["repository_up"]) if "repository_up" in found else None,
    }


def questions(host: Host) -> dict[str, Callable[[], Any]]:
    """Return what is asked on this host, by the name of its place in the report."""

    def traffic(expression: str) -> Callable[[], float | None]:
        def ask() -> float | None:
            samples = host.prometheus(expression)
            # NaN is what a quantile of nothing is.
            return next((value for _labels, value in samples if not math.isnan(value)), None)

        return ask

    def door() -> dict[str, Any]:
        status, pem = host.front_door()
        return {"status": status, "certificate": certificate(host, pem)}

    asked: dict[str, Callable[[], Any]] = {
        "containers": lambda: containers(host),
        "units": lambda: units(host),
        "model": lambda: model(host),
        "disks": lambda: disks(host),
        "docker": lambda: host.program("docker", "version", "--format", "{{.Server.Version}}").strip(),
    }
    if host.config.front:
        asked |= {
            "ready": lambda: host.http("agent", "/ready"),
            "door": door,
            "keys": lambda: keys(host),
            "backup": lambda: backup(host),
        }
    if "prometheus" in host.config.ports:
        asked["alerts"] = lambda: alerts(host)
        asked |= {f"traffic.{name}": traffic(expression) for name, expression in TRAFFIC.items()}
    if host.config.gpu:
        asked["gpus"] = lambda: gpus(host)
    return asked


def report(host: Host) -> dict[str, Any]:
    """Ask everything, and return it with a verdict. `unknown` has what gave no answer, and why."""
    began = time.time()
    answers = ask_all(questions(host))
    unknown = {name: str(answer) for name, answer in answers.items() if isinstance(answer, Unknown)}
    found = {name: None if isinstance(answer, Unknown) else answer for name, answer in answers.items()}
    door = found.get("door") or {}
    result: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "domain": host.config.domain,
        "versions": {"agent_stack": host.config.version, "docker": found["docker"]},
        "expected": expected(host.config, host.slash),
        **{name: found[name] for name in ("model", "containers", "units", "disks")},
    }
    if host.config.front:
        result |= {"ready": _ready(found["ready"]), "nginx": door.get("status"), "certificate": door.get("certificate")}
        result |= {name: found[name] for name in ("keys", "backup")}
    if "prometheus" in host.config.ports:
        result |= {"alerts": found["alerts"], "traffic": {name: found[f"traffic.{name}"] for name in TRAFFIC}}
    if host.config.gpu:
        result["gpus"] = found["gpus"]
    result["unknown"] = _once(unknown)
    down, degraded = list(is_down(result, host.config)), list(is_degraded(result, host.config, began))
    result["verdict"] = "down" if down else "degraded" if degraded else "ok"
    result["reasons"] = down + degraded
    result["seconds"] = round(time.time() - began, 2)
    return result


def _ready(answer: tuple[int, Any] | None) -> dict[str, Any] | None:
    if answer is None:
        return None
    status, body = answer
    error = body.get("error", {}) if isinstance(body, dict) else {}
    return {"ready": status == 200, "not_ready": error.get("not_ready", [])}


def _once(unknown: dict[str, str]) -> dict[str, str]:
    """The traffic's questions have one reason."""
    traffic = [reason for name, reason in unknown.items() if name.startswith("traffic.")]
    return {name: reason for name, reason in unknown.items() if not name.startswith("traffic.")} | ({"traffic": traffic[0]} if traffic else {})


def is_down(found: dict[str, Any], config: Config) -> Iterable[str]:
    """Yield why nobody is answered."""
    if "docker" in found["unknown"]:
        yield f"the Docker engine does not answer: {found['unknown']['docker']}"
    if not config.front:
        if found["model"] is not None and not found["model"]["serves"]:
            yield "no model serves"
        return
    if found["nginx"] is None:
        yield found["unknown"].get("door", "nginx does not answer")
    elif found["nginx"] != 200:
        yield f"nginx answers {found['nginx']} for /health"
    if found["ready"] is None:
        yield found["unknown"].get("ready", "the agent does not answer")
    elif not found["ready"]["ready"]:
        yield f"the agent lacks {', '.join(found['ready']['not_ready']) or 'something'}"


def is_degraded(found: dict[str, Any], config: Config, now: float) -> Iterable[str]:
    """Yield what somebody has to look at."""
    running = found["containers"]
    for container in running or []:
        standby = (config.root / container["component"] / "standby").exists()
        if not standby and (container["state"] != "running" or container["health"] not in ("healthy", "none")):
            health = "" if container["health"] == "none" else f", {container['health']}"
            yield f"{container['name']} is {container['state']}{health}"
    if running is not None:
        there = {container["component"] for container in running}
        yield from (f"{name} has no container" for name in found["expected"] if name not in there)
    for unit in found["units"] or []:
        if unit["state"] == "failed":
            yield f"{unit['name']} failed ({unit['result']})"
        elif is_stopped(unit, config):
            yield f"{unit['name']} is {unit['state']}"
    for disk in found["disks"] or []:
        if disk["free_bytes"] < disk["size_bytes"] * DISK_FREE_RATIO:
            yield f"{disk['path']} has {disk['free_bytes'] / disk['size_bytes']:.0%} free"
    certificate = found.get("certificate")
    if certificate and certificate["days"] < CERTIFICATE_DAYS:
        yield f"the certificate ends in {certificate['days']} days"
    for alert in found.get("alerts") or []:
        yield f"alert {alert['name']}: {alert['summary']}"
    backup = found.get("backup") or {}
    if backup.get("repository_up") is False:
        yield "the repository of the backups cannot be read"
    if backup.get("drill_success") is False:
        yield "the last restore drill failed"
    if backup.get("last") and now - backup["last"] > BACKUP_HOURS * 3600:
        yield f"the last backup is {age(now - backup['last'])} old"
    if backup.get("last_drill") and now - backup["last_drill"] > DRILL_DAYS * 86400:
        yield f"the last restore drill was {age(now - backup['last_drill'])} ago"
    yield from (f"{name} is not known: {reason}" for name, reason in found["unknown"].items() if name not in ("docker", "door", "ready"))


def is_stopped(unit: dict[str, str], config: Config) -> bool:
    """Whether it starts on every boot, does not run, and did not fail."""
    return unit["boot"] == "enabled" and unit["state"] not in ("active", "failed") and not _waits(unit["name"], config)


def _waits(unit: str, config: Config) -> bool:
    """Whether it is the model that waits for a rollback."""
    return (config.root / unit.removeprefix("agent-stack@").removesuffix(".service") / "standby").exists()


def age(seconds: float) -> str:
    """Return a time in words: 40 s, 12 min, 5 h, 3 d."""
    for size, word in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {word}"
    return f"{max(seconds, 0):.0f} s"
