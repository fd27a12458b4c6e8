#!/usr/bin/env python3
"""Swaps of models under load, in the test host of molecule's scenario `swap`, with scripted models.

    bench/swap.py [--swaps 20] [--rate 100] [--one-gpu 3]

First models that fit beside each other, then such as take turns on one GPU. Prints a table and, as its last line, JSON:
swaps, requests, failed, held (the most at one time), p99_ratio (side by side, while swaps go on against before).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "molecule" / "swap" / "tests"))
from swap_host import ROOT, Play, SwapHost

HOST = SwapHost("agent-stack-swap", ROOT / "molecule" / "swap" / "inventory" / "hosts.yml", "molecule/swap/tests/model.yml")
NAP, LOAD = 1, 4


def side_by_side(swaps: int, rate: float, before_seconds: float) -> dict[str, Any]:
    """Swap between models while both run, and compare with the time before."""
    check(HOST.swap("bench-even"))
    with HOST.load(rate) as traffic:
        time.sleep(before_seconds)
        begun = time.time()
        for number in range(swaps):
            check(HOST.swap("bench-odd" if number % 2 == 0 else "bench-even"))
        ended = time.time()
    before, during = traffic.percentile(0.99, 0, begun), traffic.percentile(0.99, begun, ended)
    return {
        "swaps": swaps,
        "requests": len(traffic.records),
        "failed": len(traffic.problems),
        "held": 0,
        "p99_before_ms": round(before * 1000, 1),
        "p99_during_ms": round(during * 1000, 1),
        "p99_ratio": round(during / before, 2),
        "seconds": round(ended - begun, 1),
    }


def one_gpu(strategy: str, swaps: int, rate: float) -> dict[str, Any]:
    """Swap between models of which one runs at a time: the first time each is loaded, from then on it is woken or loaded again."""
    first, second = f"bench-{strategy}-a-slow-{LOAD}-nap-{NAP}", f"bench-{strategy}-b-slow-{LOAD}-nap-{NAP}"
    check(HOST.swap(first))
    check(HOST.play(playbook="playbooks/prune.yml"))
    held: list[dict[str, float]] = []
    with HOST.load(rate) as traffic:
        for number in range(swaps):
            held.append(check(HOST.swap(second if number % 2 == 0 else first, strategy)).outcome)
        rolled_back = check(HOST.play(playbook="playbooks/rollback.yml"))
    return {
        "swaps": swaps + 1,
        "requests": len(traffic.records),
        "failed": len(traffic.problems),
        "held": int(max(outcome["held"] for outcome in held)),
        "hold_seconds": [outcome["held_seconds"] for outcome in held],
        "longest_wait_seconds": round(traffic.percentile(1), 1),
        "rollback_seconds": rolled_back.outcome.get("held_seconds"),
    }


def check(play: Play) -> Play:
    if play.returncode != 0:
        sys.exit(f"a swap failed:\n{play.output}")
    return play


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--rate", type=float, default=100)
    parser.add_argument("--one-gpu", type=int, default=3)
    parser.add_argument("--before-seconds", type=float, default=30)
    options = parser.parse_args()
    parts = {"side by side": side_by_side(options.swaps, options.rate, options.before_seconds)}
    print("side by side", parts["side by side"], flush=True)
    for strategy in ("sleep", "hold_and_recreate"):
        parts[strategy] = one_gpu(strategy, options.one_gpu, options.rate)
        print(strategy, parts[strategy], flush=True)
    print(f"\n| way | swaps | requests at {options.rate:g}/s | failed | held at most | hold, seconds | p99 before / during |\n|---|---|---|---|---|---|---|")
    for name, part in parts.items():
        holds = ", ".join(f"{seconds:.1f}" for seconds in part.get("hold_seconds", [])) or "none"
        p99 = f"{part['p99_before_ms']} / {part['p99_during_ms']} ms" if "p99_ratio" in part else ""
        print(f"| {name} | {part['swaps']} | {part['requests']:,} | {part['failed']} | {part['held']} | {holds} | {p99} |")
    whole = {key: sum(part[key] for part in parts.values()) for key in ("swaps", "requests", "failed")}
    whole |= {"held": max(part["held"] for part in parts.values()), "p99_ratio": parts["side by side"]["p99_ratio"]}
    print()
    print(json.dumps(whole))
    return 0 if whole["failed"] == 0 and whole["p99_ratio"] <= 1.5 else 1


if __name__ == "__main__":
    sys.exit(main())
