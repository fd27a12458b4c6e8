"""Requests to a gateway at a steady rate, every third a stream, whatever becomes of those before. Runs on the test host, with nothing but Python.

    load.py ADDRESS REQUESTS_PER_SECOND

Ends with its standard input, waits for what is under way, and prints one line of JSON for each request: when it began, how long it took in seconds,
whether it was a stream, which model answered, and what was wrong.
"""

import asyncio
import json
import sys
import time

LIMIT_SECONDS = 900
# A plain answer takes a tenth of a second, a stream two: enough that the model's time counts, and not that of the test host.
PLAIN = {"model": "agent-model", "messages": [{"role": "user", "content": "[[delay 0.1]] hello"}]}
STREAM = {"model": "agent-model", "stream": True, "messages": [{"role": "user", "content": "[[pace 0.02]] hello"}]}


async def ask(address: str, stream: bool) -> str:
    body = json.dumps(STREAM if stream else PLAIN).encode()
    reader, writer = await asyncio.open_connection(address, 8000)
    try:
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: model\r\nContent-Type: application/json\r\nConnection: close\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        answer = await reader.read(-1)
    finally:
        writer.close()
    head, _, rest = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1].decode() if head else "nothing"
    if status != "200":
        raise ValueError(f"answered {status}")
    if stream:
        if b"data: [DONE]" not in rest:
            raise ValueError("the stream was cut off")
        return str(json.loads(rest[rest.index(b"{") : rest.index(b"\n\n")])["system_fingerprint"])
    return str(json.loads(rest)["system_fingerprint"])


async def one(address: str, number: int) -> dict[str, object]:
    stream = number % 3 == 0
    record: dict[str, object] = {"at": time.time(), "stream": stream, "model": None, "problem": None}
    started = time.monotonic()
    try:
        record["model"] = await asyncio.wait_for(ask(address, stream), 60)
    except Exception as error:
        record["problem"] = repr(error)
    record["seconds"] = round(time.monotonic() - started, 4)
    return record


async def main(address: str, rate: float) -> None:
    loop = asyncio.get_running_loop()
    end = loop.run_in_executor(None, sys.stdin.read)
    started = time.monotonic()
    requests: list[asyncio.Task[dict[str, object]]] = []
    while not end.done() and time.monotonic() - started < LIMIT_SECONDS:
        requests.append(asyncio.create_task(one(address, len(requests))))
        await asyncio.sleep(max(0.0, started + len(requests) / rate - time.monotonic()))
    for record in await asyncio.gather(*requests):
        print(json.dumps(record))


asyncio.run(main(sys.argv[1], float(sys.argv[2])))
