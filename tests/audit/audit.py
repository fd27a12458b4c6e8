"""`make audit`: what specialists' programs say of the host that `make demo` deployed, in one table; each finding is waived with a reason, or fails.

The judges: the CIS Docker Benchmark (cis.py), `systemd-analyze security`, testssl.sh, which asks nginx in the host, and
the tests of what listens, of what containers may, and of where secrets show. The host needs Debian's package testssl.sh, which is installed there.
"""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tools"), str(ROOT / "tools" / "host")]
import cis  # noqa: E402
import demo  # noqa: E402
import host as test_host  # noqa: E402

WAIVERS = HERE / "waivers.yml"
# The highest exposure that `systemd-analyze security` may find.
EXPOSURE = 2.0
UNITS = ("agent-stack*", "nginx.service", "certbot.service")
TESTSSL = "DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends testssl.sh >/dev/null"
BAD = {"MEDIUM", "HIGH", "CRITICAL", "FATAL", "WARN"}
# By the names of their files, what other tests ask of the same host.
TESTS = {
    "what listens": ["tests/system/test_3_exposure.py", "-k", "front_door or loopback_only"],
    "confinement": ["tests/system/test_3_exposure.py", "-k", "is_confined"],
    "secrets": ["tests/system/test_3_exposure.py", "-k", "secret_shows"],
}


def engine() -> cis.Engine:
    """Ask the host's engine. Containers that have ended count, too."""
    ids = demo.on_host("docker", "ps", "--all", "--quiet", "--filter", "name=^agent-stack-").split()
    containers = json.loads(demo.on_host("docker", "inspect", *ids))
    used = sorted({item["Image"] for item in containers})
    running = [item["Name"].lstrip("/") for item in containers if item["State"]["Running"]]
    return cis.Engine(
        info=json.loads(demo.on_host("docker", "info", "--format", "{{json .}}")),
        daemon=json.loads(demo.on_host("cat", "/etc/docker/daemon.json")),
        containers=containers,
        images={item["Id"]: item for item in json.loads(demo.on_host("docker", "image", "inspect", *used))},
        processes={name: demo.on_host("docker", "top", name, "-eo", "pid,comm").split()[2:] for name in running},
        history={identity: demo.on_host("docker", "history", "--no-trunc", "--format", "{{.CreatedBy}}", identity) for identity in used},
    )


def judge_engine() -> list[cis.Finding]:
    return cis.judge(engine())


def units_of(report: str) -> list[cis.Finding]:
    """Return the findings in what `systemd-analyze security UNIT...` says."""
    exposures = dict(re.findall(r"Overall exposure level for (\S+): (\d+\.\d+)", report))
    if not any(unit.startswith("agent-stack") for unit in exposures):
        return [cis.Finding("exposure", "agent-stack*", "no unit of the stack is loaded")]
    return [cis.Finding("exposure", unit, f"{value}; allowed is {EXPOSURE}") for unit, value in exposures.items() if float(value) > EXPOSURE]


def judge_units() -> list[cis.Finding]:
    # By name: without names those that run and end are left out, which the stack's units are.
    lines = demo.on_host("systemctl", "list-units", "--all", "--type=service", "--plain", "--no-legend", *UNITS).splitlines()
    return units_of(demo.on_host("systemd-analyze", "security", "--no-pager", *(line.split()[0] for line in lines)))


def tls_of(report: str) -> list[cis.Finding]:
    """Return the findings in testssl.sh's JSON; a report without a protocol is none."""
    rows: list[dict[str, str]] = json.loads(report)
    if not any(row["id"] == "TLS1_3" for row in rows):
        return [cis.Finding("tls", "nginx", "testssl.sh came to no end")]
    return [cis.Finding(f"tls-{row['id']}", "nginx", f"{row['severity']}: {row['finding']}") for row in rows if row["severity"] in BAD]


def judge_tls() -> list[cis.Finding]:
    """What it finds twice, where a check of its own failed the first time: one lost connection is no finding."""
    found = ask_testssl()
    if any(finding.words.startswith("WARN: check failed") for finding in found):
        again = {finding.rule for finding in ask_testssl()}
        found = [finding for finding in found if finding.rule in again]
    return found


def ask_testssl() -> list[cis.Finding]:
    demo.on_host("sh", "-ec", f"command -v testssl >/dev/null || {{ apt-get update -q >/dev/null; {TESTSSL}; }}")
    options = "--quiet --color 0 --warnings off --add-ca /var/lib/pebble/roots.pem --ip 127.0.0.1 --jsonfile"
    command = f"d=$(mktemp -d); testssl {options} $d/report.json {demo.DOMAIN}:443 >/dev/null 2>&1 || :; cat $d/report.json; rm -r $d"
    return tls_of(demo.on_host("sh", "-c", command))


def judge_test(arguments: Sequence[str]) -> list[cis.Finding]:
    """Run tests that are there already. One that was not found is a finding, because pytest then ends with 5."""
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    last = [line for line in result.stdout.splitlines() if line.startswith(("E  ", "FAILED", "ERROR"))] or result.stdout.splitlines()[-1:]
    return [] if result.returncode == 0 else [cis.Finding("test", arguments[0], "; ".join(last)[:500])]


JUDGES: dict[str, Callable[[], list[cis.Finding]]] = {
    "CIS Docker": judge_engine,
    "systemd-analyze": judge_units,
    "testssl.sh": judge_tls,
    **{name: lambda arguments=arguments: judge_test(arguments) for name, arguments in TESTS.items()},  # type: ignore[misc]
}


def main() -> int:
    waivers = yaml.safe_load(WAIVERS.read_text()) or []
    found: dict[str, list[cis.Finding]] = {}
    seconds: dict[str, float] = {}
    for name, judge in JUDGES.items():
        started = time.monotonic()
        try:
            found[name] = judge()
        except (test_host.HostError, ValueError, KeyError) as error:
            found[name] = [cis.Finding("judge", name, demo.sentence(error))]
        seconds[name] = time.monotonic() - started
    everything = [finding for findings in found.values() for finding in findings]
    left, excused, wrong = cis.weigh(everything, waivers, fnmatch.fnmatchcase)
    for reason in dict.fromkeys(excused.values()):
        subjects = sorted({f"{finding.rule} {finding.subject}" for finding, why in excused.items() if why == reason})
        print(f"waived: {', '.join(subjects)}\n        {reason}")
    for finding in left:
        print(f"FOUND:  {finding.rule} {finding.subject}: {finding.words}")
    for sentence in wrong:
        print(f"FOUND:  {sentence}")
    print(f"\n{'judge':<18} {'found':>6} {'waived':>7} {'seconds':>8}")
    for name, findings in found.items():
        print(f"{name:<18} {sum(finding in left for finding in findings):>6} {sum(finding in excused for finding in findings):>7} {seconds[name]:>8.0f}")
    return 1 if left or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
