"""`agent-stack status [--json] | logs ID | doctor [--json]`."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from agent_stack_host import doctor, logs, screen, status
from agent_stack_host.ask import Config, Host, Unknown

EPILOG = "Exit codes. status: 0 well, 1 degraded (somebody has to look), 2 down (nobody is answered). doctor: 0 well, 1 not. logs: 0 found, 1 nothing found."


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="agent-stack", description="The agent stack of this host. Nothing is changed.", epilog=EPILOG)
    parser.add_argument("--config", type=Path, required=True, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="how everything is, on one screen").add_argument("--json", action="store_true")
    finding = commands.add_parser("logs", help="every line that names a request, a run or a thread")
    finding.add_argument("identifier", metavar="ID", help="the id, as in the header X-Request-ID")
    finding.add_argument("--since", default="24h", metavar="TIME", help="how far back: 90m, 24h, 7d (default: %(default)s)")
    commands.add_parser("doctor", help="what is looked at, what is wrong, and what to do").add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def show_logs(host: Host, wish: argparse.Namespace) -> int:
    lines, unknown = logs.find(host, wish.identifier, wish.since)
    for at, source, text in lines:
        print(f"{at or '-':20}  {source}  {text}")
    for source, reason in unknown.items():
        print(f"not looked into: {source}: {reason}", file=sys.stderr)
    if not lines:
        print(f"no line names {wish.identifier} in the last {wish.since}", file=sys.stderr)
    return 0 if lines else 1


def show_doctor(host: Host, as_json: bool) -> int:
    found = doctor.examine(host)
    wrong = [finding for finding in found if finding.wrong]
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        for finding in found:
            mark = "ok   " if not finding.wrong else "?    " if finding.unknown else "WRONG"
            print(f"{mark}  {finding.what}" + (f": {finding.wrong}" if finding.wrong else ""))
            if finding.remedy:
                print(f"       -> {finding.remedy}")
        print(f"{len(found)} looked at, {len(wrong)} wrong or unknown")
    return status.EXIT["degraded" if wrong else "ok"]


def main(arguments: list[str]) -> int:
    wish = parse(arguments)
    try:
        host = Host(Config.read(wish.config))
        if wish.command == "logs":
            return show_logs(host, wish)
        if wish.command == "doctor":
            return show_doctor(host, wish.json)
        found = status.report(host)
        print(json.dumps(found, indent=2) if wish.json else screen.render(found), end="\n" if wish.json else "")
        return status.EXIT[found["verdict"]]
    except (Unknown, logs.BadRequest) as error:
        print(f"agent-stack: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # Not sys.exit: that would wait for programs that hang.
    os._exit(code)
