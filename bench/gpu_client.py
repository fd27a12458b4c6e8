#!/usr/bin/env python3
"""Clients that each ask again as soon as they are answered; prints tokens/s and the time to the first token, as JSON. Standard library only.

bench/gpu_client.py URL MODEL CLIENTS SECONDS [OUTPUT_TOKENS=128] [PROMPT_WORDS=350]
"""

import json
import random
import sys
import threading
import time
from urllib.request import Request, urlopen

WORDS = ["agent", "model", "server", "token", "graph", "state", "tool", "check", "cache", "memory", "thread", "gateway", "swap", "plan", "health", "request"]


class Client(threading.Thread):
    def __init__(self, url: str, model: str, seed: int, end: float, tokens: int, words: int) -> None:
        super().__init__(daemon=True)
        self.url, self.model, self.end, self.tokens, self.words = url, model, end, tokens, words
        self.random = random.Random(seed)  # noqa: S311  prompts, not secrets
        self.answers: list[tuple[float, float, float, int]] = []  # began, first token, end, tokens

    def run(self) -> None:
        while time.monotonic() < self.end:
            self.answers.append(self.ask())

    def ask(self) -> tuple[float, float, float, int]:
        prompt = " ".join(self.random.choice(WORDS) for _ in range(self.words))
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": self.tokens, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        request = Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        began, first, tokens = time.monotonic(), 0.0, 0
        with urlopen(request, timeout=300) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if event.get("choices") and not first:
                        first = time.monotonic()
                    tokens = (event.get("usage") or {}).get("completion_tokens") or tokens
        return began, first, time.monotonic(), tokens


def main() -> None:
    url, model, clients, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    tokens, words = (int(value) for value in [*sys.argv[5:7], "128", "350"][:2]) if len(sys.argv) > 6 else (128, 350)
    Client(url, model, 0, 0, tokens, words).ask()  # the first request of all pays for what is done once
    started = time.monotonic()
    threads = [Client(url, model, seed + 1, started + seconds, tokens, words) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = [answer for thread in threads for answer in thread.answers]
    took = max(end for _, _, end, _ in answers) - started
    waits = sorted(first - began for began, first, _, _ in answers)
    result = {"clients": clients, "answers": len(answers), "tokens_per_s": round(sum(answer[3] for answer in answers) / took, 1)}
    print(json.dumps(result | {"first_token_p50_s": round(waits[len(waits) // 2], 3), "first_token_p95_s": round(waits[int(len(waits) * 0.95)], 3)}))


main()
