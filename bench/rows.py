"""What a full database costs our service: latency over 1,000,000 checkpoint rows, and memory for 10,000 idle threads.

    python bench/rows.py [--rows 1000000] [--threads 10000] [--seconds 3] [--rounds 3] [--quick]

Two services run side by side on one Postgres, one with an empty database and one whose rows are copies of real turns, and
are measured in turn. Prints a table in Markdown and, as the last line, JSON. Ends with 1 where a turn failed or a limit
is missed. AGENT_* variables change the settings of the service; BENCH_AGENT_DIR names another tree of it to measure.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import sys
import time
from collections import defaultdict, deque
from contextlib import ExitStack
from statistics import median
from uuid import UUID

import uvloop

import load
from load import Target
from services import QUESTION, Model, Ours, Postgres, Redis, rss_bytes, running

CLIENTS = (1, 8)
SAMPLE_THREADS = 50
BATCH_ROWS = 100_000
LIMIT_RATIO = 1.2
# What Postgres and the allocator of a process keep back varies by some megabytes from one look to the next.
LIMIT_BYTES_A_THREAD = 1024
SETTLE_SECONDS = 3


def new_thread(service: Ours) -> Target:
    # One user owns everything here: a thread that is continued must be its owner's.
    return dataclasses.replace(service.target("chat"), headers=service.headers.replace("%CLIENT%", "0"))


def known_thread(service: Ours) -> Target:
    return dataclasses.replace(new_thread(service), body=f'{{"message":"{QUESTION}","thread_id":"%THREAD%"}}')


def turns(service: Ours, clients: int, seconds: float, *, warm: float = 0.0, threads: deque[str] | None = None) -> load.Sample:
    target = known_thread(service) if threads is not None else new_thread(service)
    sample = uvloop.run(load.run(target, clients, seconds, warm=warm, threads=threads))
    if sample.errors:
        raise SystemExit(f"{len(sample.errors)} turns failed: {sample.errors[0]}")
    return sample


def copy_of(thread_id: str, number: int) -> str:
    """The id of a copy; scattered like random ones, so that the indexes are as wide as in real use."""
    return str(UUID(hashlib.md5(f"{thread_id}-{number}".encode(), usedforsecurity=False).hexdigest()))


def fill(postgres: Postgres, database: str, rows: int) -> tuple[list[str], int]:
    """Copy the rows of some threads until there are that many checkpoints. Returns the threads and how often each was copied."""
    threads = [row[0] for row in postgres.rows(database, "SELECT DISTINCT thread_id FROM checkpoints ORDER BY 1 LIMIT %s", SAMPLE_THREADS)]
    each = postgres.rows(database, "SELECT count(*) FROM checkpoints WHERE thread_id = ANY(%s)", threads)[0][0]
    copies = -(-rows // each)
    # The table that the others refer to comes first.
    tables = """SELECT table_name FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)
                WHERE table_schema = 'public' AND column_name = 'thread_id' AND table_type = 'BASE TABLE' ORDER BY table_name <> 'threads', 1"""
    for (table,) in postgres.rows(database, tables):
        columns = columns_of(postgres, database, table)
        statement = f"""INSERT INTO {table} ({", ".join(columns)}) SELECT {", ".join(columns.values())}
                        FROM {table} CROSS JOIN generate_series(%s::int, %s::int) AS number WHERE thread_id = ANY(%s)"""  # noqa: S608  names from the catalogue
        step = max(1, BATCH_ROWS // each)
        for first in range(0, copies, step):
            postgres.rows(database, statement, first, min(copies, first + step) - 1, threads)
        print(f"{table}: {postgres.rows(database, f'SELECT count(*) FROM {table}')[0][0]:,} rows", file=sys.stderr, flush=True)  # noqa: S608
        postgres.rows(database, f"VACUUM (ANALYZE) {table}")
    postgres.rows(database, "CHECKPOINT")
    return threads, copies


def columns_of(postgres: Postgres, database: str, table: str) -> dict[str, str]:
    """What each column of a copied row is made of."""
    statement = """
        SELECT c.column_name, c.data_type, EXISTS (
            SELECT 1 FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey)
            WHERE i.indrelid = c.table_name::regclass AND i.indisprimary AND a.attname = c.column_name)
        FROM information_schema.columns c WHERE c.table_schema = 'public' AND c.table_name = %s AND c.is_generated = 'NEVER'"""
    columns = {}
    for name, kind, key in postgres.rows(database, statement, table):
        if name == "thread_id":
            columns[name] = "md5(thread_id || '-' || number)::uuid::text"
        elif key and kind == "uuid":
            columns[name] = "gen_random_uuid()"
        else:
            columns[name] = name
    return columns


def compare(empty: Ours, full: Ours, known: dict[str, deque[str]], seconds: float, rounds: int) -> tuple[str, dict[str, float]]:
    figures: dict[tuple[str, int, str, float], list[float]] = defaultdict(list)
    for number in range(rounds):
        for clients in CLIENTS:
            for kind in ("new", "continued"):
                for service in (empty, full) if number % 2 else (full, empty):
                    with running(service):
                        pool = known[service.database or ""]
                        sample = turns(service, clients, seconds, warm=0.5, threads=pool if kind == "continued" else None)
                    if kind == "new" and service is empty:
                        # To be continued once, by and by: a history that grows would be measured, too.
                        pool.extendleft(sample.threads)
                    for share in (0.5, 0.95):
                        figures[kind, clients, service.database or "", share].append(load.percentile(sample.latencies, share) * 1000)
    rows = ["| turn on | clients | empty: p50 / p95 | full: p50 / p95 | ratio |", "| --- | --- | --- | --- | --- |"]
    ratios: dict[str, float] = {}
    for kind in ("new", "continued"):
        for clients in CLIENTS:
            cells = []
            for service in (empty, full):
                p50, p95 = (median(figures[kind, clients, service.database or "", share]) for share in (0.5, 0.95))
                cells.append(f"{p50:.1f} / {p95:.1f} ms")
            for share, name in ((0.5, "p50"), (0.95, "p95")):
                pairs = zip(figures[kind, clients, full.database or "", share], figures[kind, clients, empty.database or "", share], strict=True)
                ratios[f"{kind}_{name}_at_{clients}"] = round(median(after / before for after, before in pairs), 2)
            ratio = f"{ratios[f'{kind}_p50_at_{clients}']:.2f} / {ratios[f'{kind}_p95_at_{clients}']:.2f}"
            rows.append(f"| a {kind.replace('continued', 'known')} thread | {clients} | {cells[0]} | {cells[1]} | {ratio} |")
    return "\n".join(rows), ratios


def memory_of_threads(service: Ours, threads: int) -> tuple[int, int]:
    """The memory of the service's processes before and after that many threads more had their turn."""
    with running(service):
        made = 0
        # What is allocated once is no cost of a thread.
        while made < threads // 5:
            made += turns(service, 8, 1).answered
        time.sleep(SETTLE_SECONDS)
        before = rss_bytes(service.pid)
        made = 0
        while made < threads:
            made += turns(service, 8, min(5.0, max(0.1, (threads - made) / 300))).answered
        time.sleep(SETTLE_SECONDS)
        return before, rss_bytes(service.pid)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, help="how many rows the table of checkpoints has (1000000; 20000 with --quick)")
    parser.add_argument("--threads", type=int, help="how many idle threads (10000; 500 with --quick)")
    parser.add_argument("--seconds", type=float, help="how long each cell is measured in each round (3; 1 with --quick)")
    parser.add_argument("--rounds", type=int, help="how often everything is measured (5; 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="a look in a minute, with few rows")
    options = parser.parse_args()
    quick = options.quick
    rows, threads = options.rows or (20_000 if quick else 1_000_000), options.threads or (500 if quick else 10_000)
    seconds, rounds = options.seconds or (1 if quick else 3), options.rounds or (1 if quick else 5)

    with ExitStack() as stack:
        postgres = Postgres()
        stack.callback(postgres.remove)
        model = Model()
        stack.callback(model.remove)
        postgres.database("agent_full")
        services = []
        known: dict[str, deque[str]] = {}
        for database in ("agent", "agent_full"):
            # Each its own: the limits of a user are counted there.
            redis = Redis()
            stack.callback(redis.remove)
            service = Ours(postgres, redis, model, database)
            stack.callback(service.remove)
            service.start()
            with running(service):
                known[database] = deque(turns(service, 8, 3).threads)
            services.append(service)
        empty, full = services
        started = time.monotonic()
        samples, copies = fill(postgres, "agent_full", rows)
        print(f"filled in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        filled = postgres.rows("agent_full", "SELECT count(*) FROM checkpoints")[0][0]
        size = postgres.rows("agent_full", "SELECT pg_database_size('agent_full')")[0][0]
        copied = [copy_of(thread, number) for thread in samples for number in range(copies)]
        random.Random(3).shuffle(copied)  # noqa: S311  an order, no secret
        known["agent_full"] = deque(copied)
        table, ratios = compare(empty, full, known, seconds, rounds)
        before, after = memory_of_threads(empty, threads)

    growth = max(0, after - before)
    print(f"Postgres with {filled:,} rows of checkpoints ({size / 2**20:,.0f} MiB) against an empty one; {rounds} rounds of {seconds:g} s, medians\n")
    print(table)
    print(f"\n{threads:,} threads: the service had {before / 2**20:.1f} MiB before and {after / 2**20:.1f} MiB after, {growth / threads:.0f} bytes a thread\n")
    within = all(ratio <= LIMIT_RATIO for name, ratio in ratios.items() if "p50" in name) and growth / threads <= LIMIT_BYTES_A_THREAD
    result = {"rows": filled, **ratios, "threads": threads, "memory_mib": [round(value / 2**20, 1) for value in (before, after)]}
    print(json.dumps(result | {"bytes_a_thread": round(growth / threads), "within_limits": within}))
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
