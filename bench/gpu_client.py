#!/usr/bin/env python3
"""Clients that each ask again as soon as they are answered; prints tokens/s and the time to the first token, as JSON. Standard library only.

    bench/gpu_client.py URL MODEL CLIENTS SECONDS [OUTPUT_TOKENS=128] [PROMPT_WORDS=350] [options]

    --path PATH         of the API (/v1/chat/completions)
    --header "N: V"     sent with each request; more than one may be given
    --ca FILE           certificates to trust for an https URL
    --plain             without `ignore_eos`, for a server that takes OpenAI's own parameters only
    --processes N       that the clients are spread over (1)
    --seed N            another seed is other prompts, so that no cache of an earlier run knows them (0)
    --until FILE        ends once FILE is there, and after SECONDS at the latest

The result's `failed` counts requests that got another status than 200, broke off, or brought no token; their reasons are in `failures`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import random
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WORDS = ["agent", "model", "server", "token", "graph", "state", "tool", "check", "cache", "memory", "thread", "gateway", "swap", "plan", "health", "request"]
TIMEOUT_SECONDS = 330
# After a failure; a server that refuses at once would otherwise be asked thousands of times.
PAUSE_SECONDS = 0.2
FAILURES_SHOWN = 5


@dataclass(frozen=True)
class Answer:
    """Times are of the monotonic clock, in seconds. `failure` says why there is no answer, and is empty for a good one."""

    began: float
    first: float = 0.0
    end: float = 0.0
    tokens: int = 0
    failure: str = ""


class Client(threading.Thread):
    """One connection, kept from one request to the next."""

    def __init__(self, options: argparse.Namespace, seed: int, end: float) -> None:
        super().__init__(daemon=True)
        self.options, self.end = options, end
        self.random = random.Random(seed)  # noqa: S311  prompts, not secrets
        self.connection: http.client.HTTPConnection | None = None
        self.answers: list[Answer] = []

    def run(self) -> None:
        while time.monotonic() < self.end and not (self.options.until and self.options.until.exists()):
            self.answers.append(self.ask())
            if self.answers[-1].failure:
                time.sleep(PAUSE_SECONDS)

    def ask(self) -> Answer:
        began = time.monotonic()
        try:
            return self._ask(began)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._close()
            return Answer(began, failure=f"{type(error).__name__}: {error}")

    def _ask(self, began: float) -> Answer:
        connection = self.connection = self.connection or self._connect()
        connection.request("POST", self.options.path, json.dumps(self._body()), {"Content-Type": "application/json"} | self.options.headers)
        response = connection.getresponse()
        if response.status != http.client.OK:
            failure = f"{response.status}: {response.read()[:200]!r}"
            return Answer(began, failure=failure)
        first, tokens, failure = 0.0, 0, "broke off"
        for line in response:
            if line.startswith(b"data: [DONE]"):
                failure = ""
            # Most lines carry one token and nothing else that is asked for here: they are not parsed.
            elif line.startswith(b"data: {") and (not first or b'"completion_tokens"' in line or b'"error"' in line):
                event = json.loads(line[6:])
                if "error" in event:
                    self._close()
                    return Answer(began, failure=str(event["error"])[:200])
                if not first and any((choice.get("delta") or {}).get("content") for choice in event.get("choices") or []):
                    first = time.monotonic()
                tokens = (event.get("usage") or {}).get("completion_tokens") or tokens
        # Lines alone do not tell the connection that the answer is over, and it would take no other request.
        response.read()
        if not tokens and not failure:
            failure = "no token"
        if failure:
            self._close()
        return Answer(began, first or time.monotonic(), time.monotonic(), tokens, failure)

    def _body(self) -> dict[str, Any]:
        prompt = " ".join(self.random.choice(WORDS) for _ in range(self.options.words))
        body = {"model": self.options.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": self.options.tokens}
        return body | {"stream": True, "stream_options": {"include_usage": True}} | ({} if self.options.plain else {"ignore_eos": True})

    def _connect(self) -> http.client.HTTPConnection:
        url = urlsplit(self.options.url)
        host = url.hostname or ""
        if url.scheme == "https":
            return http.client.HTTPSConnection(host, url.port, timeout=TIMEOUT_SECONDS, context=ssl.create_default_context(cafile=self.options.ca))
        return http.client.HTTPConnection(host, url.port, timeout=TIMEOUT_SECONDS)

    def _close(self) -> None:
        if self.connection:
            self.connection.close()
        self.connection = None


def work(options: argparse.Namespace, seeds: list[int], end: float) -> list[Answer]:
    """What one process does: a client for each seed, until all have ended."""
    clients = [Client(options, seed, end) for seed in seeds]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return [answer for client in clients for answer in client.answers]


def summary(answers: list[Answer], started: float, clients: int) -> dict[str, Any]:
    """The figures of a run; a figure that no answer gives is left out."""
    good = [answer for answer in answers if not answer.failure]
    failures = [answer.failure for answer in answers if answer.failure]
    result: dict[str, Any] = {"clients": clients, "answers": len(good), "failed": len(failures)}
    if good:
        waits = sorted(answer.first - answer.began for answer in good)
        took = max(answer.end for answer in good) - started
        result["tokens"] = sum(answer.tokens for answer in good)
        result["tokens_per_s"] = round(result["tokens"] / took, 1)
        result["first_token_p50_s"] = round(waits[len(waits) // 2], 3)
        result["first_token_p95_s"] = round(waits[int(len(waits) * 0.95)], 3)
        result["longest_s"] = round(max(answer.end - answer.began for answer in good), 1)
    if failures:
        result["failures"] = failures[:FAILURES_SHOWN]
    return result


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("clients", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("tokens", type=int, nargs="?", default=128)
    parser.add_argument("words", type=int, nargs="?", default=350)
    parser.add_argument("--path", default="/v1/chat/completions")
    parser.add_argument("--header", action="append", default=[])
    parser.add_argument("--ca")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=Path)
    options = parser.parse_args(arguments)
    for header in options.header:
        if ":" not in header:
            parser.error(f"--header is {header!r}; allowed is `Name: value`.")
    options.headers = {name.strip(): value.strip() for name, value in (header.split(":", 1) for header in options.header)}
    return options


def main() -> None:
    options = parse()
    # The first request of all pays for what is done once.
    Client(options, options.seed * 1_000_003, 0).ask()
    seeds = [options.seed * 1_000_003 + number + 1 for number in range(options.clients)]
    processes = max(1, min(options.processes, options.clients))
    shares = [seeds[number::processes] for number in range(processes)]
    started = time.monotonic()
    end = started + options.seconds
    if processes == 1:
        answers = work(options, seeds, end)
    else:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            answers = [answer for some in pool.starmap(work, [(options, share, end) for share in shares]) for answer in some]
    print(json.dumps(summary(answers, started, options.clients)))


if __name__ == "__main__":
    main()
