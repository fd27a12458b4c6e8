"""What live turns notice of the retention job: 100,000 idle threads go while clients talk without a pause.

    python bench/retention.py [--threads 100000] [--clients 8] [--window 5] [--quick]

The idle threads are copies of real turns. The job runs as its timer runs it, in a process of its own, and shares the machine
with the service, Postgres, the model and the clients. Prints a table in Markdown and, as the last line, JSON. Ends with 1
where a turn failed, a thread was left over or one too many went, or the 95th percentile rose beyond the limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median

import load
from rows import fill, turns
from services import Model, Ours, Postgres, Redis

LIMIT_RATIO = 1.5
DATABASE = "retained"
CALM_WINDOWS = 3
TABLES = ("threads", "runs", "checkpoints", "checkpoint_writes", "checkpoint_blobs")


def count(postgres: Postgres, table: str) -> int:
    return int(postgres.rows(DATABASE, f"SELECT count(*) FROM {table}")[0][0])  # noqa: S608  a name of ours


def p95(samples: Sequence[load.Sample]) -> float:
    return load.percentile([latency for sample in samples for latency in sample.latencies], 0.95) * 1000


def row(name: str, samples: Sequence[load.Sample]) -> str:
    latencies = [latency for sample in samples for latency in sample.latencies]
    p50 = load.percentile(latencies, 0.5) * 1000
    rate = median(sample.rate for sample in samples)
    return f"| {name} | {len(samples)} | {rate:.0f} | {p50:.1f} ms | {p95(samples):.1f} ms |"


def calm(service: Ours, clients: int, window: float) -> list[load.Sample]:
    return [turns(service, clients, window) for _ in range(CALM_WINDOWS)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--window", type=float, default=5)
    parser.add_argument("--quick", action="store_true", help="5,000 threads and short windows, to see that it works")
    wish = parser.parse_args()
    idle, window = (5000, 2.0) if wish.quick else (wish.threads, wish.window)
    with ExitStack() as stack:
        postgres = Postgres()
        stack.callback(postgres.remove)
        redis = Redis()
        stack.callback(redis.remove)
        model = Model()
        stack.callback(model.remove)
        postgres.database(DATABASE)
        service = Ours(postgres, redis, model, DATABASE)
        stack.callback(service.remove)
        service.environ["AGENT_RATE_LIMIT"] = "100000/minute"
        service.start()

        turns(service, wish.clients, 2)
        each = postgres.rows(DATABASE, "SELECT count(*)::float / count(DISTINCT thread_id) FROM checkpoints")[0][0]
        live = [thread for (thread,) in postgres.rows(DATABASE, "SELECT thread_id FROM threads")]
        fill(postgres, DATABASE, int(idle * each))
        copies = count(postgres, "threads") - len(live)
        postgres.rows(DATABASE, "UPDATE threads SET last_active = now() - interval '40 days' WHERE NOT thread_id = ANY(%s)", live)
        postgres.rows(DATABASE, "VACUUM (ANALYZE) threads")
        job = [sys.executable, "-m", "agent.retention"]
        before = calm(service, wish.clients, window)
        started = time.monotonic()
        with subprocess.Popen(job, env=service.environ, cwd=service.directory, stdout=subprocess.PIPE, text=True) as process:
            during = []
            while process.poll() is None:
                during.append(turns(service, wish.clients, window))
            assert process.stdout is not None
            words = process.stdout.read()
        seconds = time.monotonic() - started
        after = calm(service, wish.clients, window)
        left = {table: count(postgres, table) for table in TABLES}
        talked = len(live) + sum(sample.answered for sample in (*before, *during, *after))

    summary = json.loads(words.splitlines()[0])
    ratio = p95(during) / p95([*before, *after])
    print(f"{wish.clients} clients without a pause, each turn on a new thread, while {copies:,} idle threads go\n")
    print("| | windows | turns/s | p50 | p95 |\n| --- | --- | --- | --- | --- |")
    print("\n".join((row("before", before), row("during", during), row("after", after))))
    print(f"\n{summary['threads']:,} threads, {summary['checkpoints']:,} checkpoints, {summary['blobs']:,} blobs and {summary['writes']:,} writes")
    print(f"went in {summary['seconds']:.0f} s; the p95 of live turns was {ratio:.2f} times what it is without\n")
    exact = process.returncode == 0 and summary["threads"] == copies and left["threads"] == left["runs"] == talked
    within = exact and ratio <= LIMIT_RATIO
    figures = {"threads": summary["threads"], "seconds": summary["seconds"], "p95_ratio": round(ratio, 2)}
    print(json.dumps(figures | {"wall_seconds": round(seconds, 1), "exact": exact, "within_limits": within}))
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
