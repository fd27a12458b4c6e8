#!/usr/bin/env python3
"""A scripted OpenAI-compatible server that stands in for vLLM in tests.

It has no model: the last user message is its script.

    [[tool NAME ARGUMENTS]]   call this tool (several make parallel calls), then answer with its result
    [[loop NAME ARGUMENTS]]   call this tool again and again
    [[delay SECONDS]]         wait before answering; [[pace SECONDS]] wait between the pieces of a stream
    [[think TEXT]]            think this before the answer
    [[fault KIND]]            an HTTP status, or hang, reset, truncate, garbage, surrogate, overflow
    anything else             is answered with the number of user messages and a quotation of the first one

The last part of the model's path tells how the server itself behaves: `...-slow-SECONDS` is long in starting, `...-dying` ends while it starts,
`...-dull` answers everything with garbage, `...-blunt` calls no tools, `...-seeing` takes images. With VLLM_SERVER_DEV_MODE=1 it sleeps and wakes up as
vLLM does, and takes `...-nap-SECONDS` to fall asleep; asked while it sleeps it fails. Without a name for its user it does not start.
`system_fingerprint` in an answer is the name of the model.

With `--nnodes` it is one of several that share a model, as vLLM is: the head starts once all have come to its port, and answers nothing any more when one
of them is gone; the others, which are `--headless`, do not notice when the head is.

GET /_control tells the last requests and the faults set. POST /_control {"fault": KIND, "times": N} makes the next N
generations fail whatever they ask (null ends it), {"health": STATUS} changes what /health says, {"clear": true}
forgets everything.
"""

import argparse
import bisect
import collections
import contextlib
import itertools
import json
import os
import pwd
import re
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SCRIPT = re.compile(r"\[\[(tool|loop|delay|pace|think|fault) (.*?)\]\](?!\])", re.DOTALL)
BUCKETS = (0.001, 0.01, 0.1, 0.3, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_BUCKETS = (1, 10, 100, 1000, 10000, 100000)
HANG_SECONDS = 3600

HISTOGRAMS = {
    "vllm:e2e_request_latency_seconds": BUCKETS,
    "vllm:time_to_first_token_seconds": BUCKETS,
    "vllm:inter_token_latency_seconds": BUCKETS,
    "vllm:request_time_per_output_token_seconds": BUCKETS,
    "vllm:request_queue_time_seconds": BUCKETS,
    "vllm:request_inference_time_seconds": BUCKETS,
    "vllm:request_prefill_time_seconds": BUCKETS,
    "vllm:request_decode_time_seconds": BUCKETS,
    "vllm:request_prompt_tokens": TOKEN_BUCKETS,
    "vllm:request_generation_tokens": TOKEN_BUCKETS,
    "vllm:iteration_tokens_total": TOKEN_BUCKETS,
}
COUNTERS = (
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
)
REASONS = ("stop", "length", "abort", "error")


class Metrics:
    """A few of vLLM's metrics, under their own names and types, counted from what really happens here."""

    def __init__(self, model_name):
        self.label = f'engine="0",model_name="{model_name}"'
        self.lock = threading.Lock()
        self.running = 0
        self.count = collections.Counter()
        self.buckets = {name: [0] * (len(bounds) + 1) for name, bounds in HISTOGRAMS.items()}
        self.sums = dict.fromkeys(HISTOGRAMS, 0.0)

    def add(self, name, amount):
        with self.lock:
            self.count[name] += amount

    def run(self, change):
        with self.lock:
            self.running += change

    def observe(self, **values):
        with self.lock:
            for name, value in values.items():
                name = f"vllm:{name}"
                self.buckets[name][bisect.bisect_left(HISTOGRAMS[name], value)] += 1
                self.sums[name] += value

    def text(self):
        with self.lock:
            lines = []
            for name, value in (
                ("vllm:num_requests_running", self.running),
                ("vllm:num_requests_waiting", 0),
                ("vllm:kv_cache_usage_perc", min(1, self.running / 100)),
            ):
                lines += [f"# HELP {name} Scripted.", f"# TYPE {name} gauge", f"{name}{{{self.label}}} {value}"]
            lines += ["# HELP vllm:engine_sleep_state Scripted.", "# TYPE vllm:engine_sleep_state gauge"]
            lines += [f'vllm:engine_sleep_state{{{self.label},sleep_state="awake"}} 1']
            lines += ["# HELP vllm:cache_config_info Scripted.", "# TYPE vllm:cache_config_info gauge"]
            lines += ['vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1']
            for name in COUNTERS:
                lines += [f"# HELP {name} Scripted.", f"# TYPE {name} counter"]
                lines += [f"{name}{{{self.label}}} {self.count[name]}"]
            lines += ["# HELP vllm:request_success_total Scripted.", "# TYPE vllm:request_success_total counter"]
            for reason in REASONS:
                lines += [f'vllm:request_success_total{{{self.label},finished_reason="{reason}"}} {self.count[reason]}']
            for name, bounds in HISTOGRAMS.items():
                lines += [f"# HELP {name} Scripted.", f"# TYPE {name} histogram"]
                totals = list(itertools.accumulate(self.buckets[name]))
                for bound, total in zip((*map(float, bounds), "+Inf"), totals, strict=True):
                    lines += [f'{name}_bucket{{{self.label},le="{bound}"}} {total}']
                lines += [f"{name}_sum{{{self.label}}} {self.sums[name]}", f"{name}_count{{{self.label}}} {totals[-1]}"]
            return "\n".join(lines) + "\n"


class ModelServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address, names, api_keys=(), max_model_len=8192, model="scripted", dev_mode=False):
        super().__init__(address, Handler)
        self.names = names
        self.model = model
        self.nodes = None
        self.dev_mode = dev_mode
        self.asleep = False
        # An engine takes one order after the other, and answers no question about itself meanwhile.
        self.order = threading.Lock()
        self.api_keys = set(api_keys)
        self.max_model_len = max_model_len
        self.metrics = Metrics(names[0])
        self.lock = threading.Lock()
        self.clear()

    def clear(self):
        with self.lock:
            self.fault, self.times, self.health = None, None, 200
            self.requests = collections.deque(maxlen=200)

    def control(self, wish):
        if wish.get("clear"):
            self.clear()
        with self.lock:
            if "fault" in wish:
                self.fault, self.times = wish["fault"], wish.get("times")
            self.health = wish.get("health", self.health)

    def next_fault(self):
        with self.lock:
            fault = self.fault
            if fault is not None and self.times is not None:
                self.times -= 1
                if self.times <= 0:
                    self.fault = self.times = None
            return fault

    def state(self):
        with self.lock:
            return {"fault": self.fault, "times": self.times, "health": self.health, "requests": list(self.requests)}

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class UnixModelServer(ModelServer):
    address_family = socket.AF_UNIX

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address, 0

    def finish_request(self, request, client_address):
        UnixHandler(request, client_address, self)


class Nodes:
    """The other hosts of a model, as the head sees them."""

    def __init__(self, address, port, number):
        self.lost = False
        self.missing = threading.Semaphore(0)
        self.listening = socket.create_server((address, port))
        threading.Thread(target=self.accept, daemon=True).start()
        for _ in range(number):
            self.missing.acquire()

    def accept(self):
        while True:
            threading.Thread(target=self.watch, args=(self.listening.accept()[0],), daemon=True).start()

    def watch(self, connection):
        """Whoever says nothing only wants to see how long the head is there."""
        if connection.recv(16):
            self.missing.release()
            with contextlib.suppress(OSError):
                connection.recv(16)
            self.lost = True


def follow(address, port, rank):
    """Be one of the others: work for the head, whatever becomes of it."""
    head = socket.create_connection((address, port), 60)
    head.sendall(f"rank {rank}".encode())
    print(f"scripted follower {rank} of {address}:{port}", flush=True)
    while True:
        time.sleep(HANG_SECONDS)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "scripted-model"
    sys_version = ""
    disable_nagle_algorithm = True

    def log_message(self, format, *args):
        print(f"{self.command} {self.path} {args[1] if len(args) > 1 else ''}", flush=True)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path in ("/health", "/ping"):
            self.reply(self.server.health, b"")
        elif path == "/metrics":
            self.reply(200, self.server.metrics.text().encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif path == "/version":
            self.reply_json(200, {"version": "0.0.0+scripted"})
        elif path == "/_control":
            self.reply_json(200, self.server.state())
        elif path == "/is_sleeping" and self.server.dev_mode:
            with self.server.order:
                asleep = self.server.asleep
            self.reply_json(200, {"is_sleeping": asleep})
        elif path == "/v1/models":
            if self.authorised():
                length = self.server.max_model_len
                models = [{"id": name, "object": "model", "created": 0, "owned_by": "scripted", "max_model_len": length} for name in self.server.names]
                self.reply_json(200, {"object": "list", "data": models})
        else:
            self.refuse(404, "Not Found")

    def do_POST(self):
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        except ValueError:
            return self.refuse(400, "The body is not JSON")
        path = self.path.partition("?")[0]
        if path == "/_control":
            self.server.control(body)
            return self.reply_json(200, self.server.state())
        if path in ("/sleep", "/wake_up") and self.server.dev_mode:
            with self.server.order:
                if path == "/sleep" and not self.server.asleep:
                    time.sleep(seconds_in(self.server.model, "nap"))
                self.server.asleep = path == "/sleep"
            return self.reply(200, b"")
        if path != "/v1/chat/completions":
            return self.refuse(404, "Not Found")
        if self.server.asleep:
            return self.refuse(500, "The engine sleeps")
        if not self.authorised():
            return None
        if body.get("model") not in self.server.names:
            return self.refuse(404, f"The model `{body.get('model')}` does not exist.")
        with self.server.lock:
            self.server.requests.append(body)
        self.server.metrics.run(1)
        try:
            return self.generate(body)
        finally:
            self.server.metrics.run(-1)

    def authorised(self):
        keys = self.server.api_keys
        if not keys or self.headers.get("Authorization", "").removeprefix("Bearer ") in keys:
            return True
        self.reply_json(401, {"error": "Unauthorized"})
        return False

    def generate(self, body):
        started = time.monotonic()
        messages = body.get("messages") or []
        users = [text_of(message) for message in messages if message.get("role") == "user"]
        script = SCRIPT.findall(users[-1]) if users else []
        wishes = dict(script)
        if "delay" in wishes:
            time.sleep(float(wishes["delay"]))
        if self.server.nodes and self.server.nodes.lost:
            return self.fail("hang")
        fault = self.server.next_fault() or wishes.get("fault") or ("garbage" if self.server.model.endswith("-dull") else None)
        if fault and fault not in ("truncate", "surrogate"):
            return self.fail(fault)

        if not self.server.model.endswith("-seeing") and any(has_image(message) for message in messages):
            return self.refuse(400, f"{self.server.model} is not a multimodal model")
        done = tool_results(messages)
        if body.get("tools") and "Call the tool report_number" in (users or [""])[-1] and not self.server.model.endswith("-blunt"):
            # What vllm_health asks for; a model with tools understands it.
            script = [("tool", 'report_number {"number": 7}')]
        calls = [wish.partition(" ")[::2] for kind, wish in script if kind == "loop" or (kind == "tool" and not done)]
        if calls:
            content = None
        elif fault == "surrogate":
            content = "half of a pair: \ud800"
        elif done:
            content = f"The tool says: {'; '.join(done)}"
        else:
            plural = "message" if len(users) == 1 else "messages"
            content = f'I see {len(users)} user {plural}. The first one was: "{users[0] if users else ""}"'
        pieces = re.findall(r"\S+\s*", content or "")
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or len(pieces)
        thought = wishes.get("think")
        logprobs = None
        if body.get("logprobs"):
            logprobs = [{"token": piece, "logprob": -0.5, "bytes": list(piece.encode()), "top_logprobs": []} for piece in pieces[:limit]]
        reason = "tool_calls" if calls else "length" if len(pieces) > limit else "stop"
        pieces = pieces[:limit]
        prompt = sum(len(text_of(message).split()) for message in messages)
        usage = {"prompt_tokens": prompt, "completion_tokens": max(1, len(pieces))}
        usage["total_tokens"] = sum(usage.values())
        answer = {"id": f"chatcmpl-{time.monotonic_ns()}", "created": int(time.time()), "model": body["model"]}
        answer["system_fingerprint"] = self.server.model
        tool_calls = [
            {"id": f"call-{time.monotonic_ns()}-{number}", "type": "function"} | {"function": {"name": name, "arguments": arguments}}
            for number, (name, arguments) in enumerate(calls)
        ]
        if body.get("stream"):
            wants_usage = (body.get("stream_options") or {}).get("include_usage")
            pace = float(wishes.get("pace", 0))
            self.stream(answer, thought, pieces, logprobs, tool_calls, reason, usage if wants_usage else None, pace, fault == "truncate")
        else:
            message = {"role": "assistant", "content": None if calls else "".join(pieces), "tool_calls": tool_calls}
            if thought:
                message["reasoning_content"] = thought
            choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": {"content": logprobs} if logprobs else None}
            answer |= {"object": "chat.completion", "choices": [choice], "usage": usage}
            self.reply_json(200, answer, truncated=fault == "truncate")
        self.count(usage, "length" if reason == "length" else "stop", time.monotonic() - started)
        return None

    def stream(self, answer, thought, pieces, logprobs, tool_calls, reason, usage, pace, truncated):
        deltas = [{"role": "assistant", "content": ""}]
        deltas += [{"reasoning_content": piece} for piece in re.findall(r"\S+\s*", thought or "")]
        spoken = len(deltas)
        deltas += [{"content": piece} for piece in pieces]
        for index, call in enumerate(tool_calls):
            arguments = call["function"]["arguments"]
            middle = len(arguments) // 2
            first = call | {"index": index, "function": call["function"] | {"arguments": arguments[:middle]}}
            deltas += [{"tool_calls": [first]}]
            deltas += [{"tool_calls": [{"index": index, "function": {"arguments": arguments[middle:]}}]}]
        if truncated:
            deltas = deltas[: len(deltas) // 2 + 1]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        answer = answer | {"object": "chat.completion.chunk"}
        for number, delta in enumerate(deltas):
            told = logprobs[number - spoken : number - spoken + 1] if logprobs and number >= spoken else []
            self.event(answer | {"choices": [{"index": 0, "delta": delta, "finish_reason": None, "logprobs": {"content": told} if told else None}]})
            time.sleep(pace)
        if truncated:
            return self.cut()
        self.event(answer | {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        if usage:
            self.event(answer | {"choices": [], "usage": usage})
        return self.chunk(b"data: [DONE]\n\n") or self.wfile.write(b"0\r\n\r\n")

    def event(self, value):
        self.chunk(f"data: {json.dumps(value)}\n\n".encode())

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def count(self, usage, reason, seconds):
        metrics = self.server.metrics
        prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
        metrics.add("vllm:prompt_tokens_total", prompt)
        metrics.add("vllm:prefix_cache_queries_total", prompt)
        metrics.add("vllm:generation_tokens_total", completion)
        metrics.add(reason, 1)
        metrics.observe(
            e2e_request_latency_seconds=seconds,
            time_to_first_token_seconds=seconds / completion,
            inter_token_latency_seconds=seconds / completion,
            request_time_per_output_token_seconds=seconds / completion,
            request_queue_time_seconds=0,
            request_inference_time_seconds=seconds,
            request_prefill_time_seconds=0,
            request_decode_time_seconds=seconds,
            request_prompt_tokens=prompt,
            request_generation_tokens=completion,
            iteration_tokens_total=prompt + completion,
        )

    def fail(self, fault):
        self.server.metrics.add("abort" if fault in ("hang", "reset") else "error", 1)
        if fault == "hang":
            time.sleep(HANG_SECONDS)
        elif fault == "reset":
            # A linger of zero makes close() send RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.cut()
        elif fault == "garbage":
            self.reply(200, b"<html>not JSON", "application/json")
        elif fault == "overflow":
            self.refuse(400, f"This model's maximum context length is {self.server.max_model_len} tokens.")
        else:
            self.refuse(int(fault), "A fault that was asked for")

    def cut(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    def refuse(self, status, message):
        self.reply_json(status, {"error": {"message": message, "type": "Error", "param": None, "code": status}})

    def reply_json(self, status, value, truncated=False):
        self.reply(status, json.dumps(value).encode(), "application/json", truncated)

    def reply(self, status, data, content_type="text/plain", truncated=False):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if truncated else data)
        if truncated:
            self.cut()


class UnixHandler(Handler):
    # There is no such algorithm on a Unix socket.
    disable_nagle_algorithm = False


def text_of(message):
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def has_image(message):
    content = message.get("content")
    return isinstance(content, list) and any(part.get("type") == "image_url" for part in content)


def tool_results(messages):
    """The results that came in after the last user message."""
    results = []
    for message in reversed(messages):
        if message.get("role") == "user":
            break
        if message.get("role") == "tool":
            results.insert(0, text_of(message))
    return results


def seconds_in(model, what):
    """The number in `...-WHAT-SECONDS` of a model's name, or 0."""
    found = re.search(rf"-{what}-([0-9.]+)", model)
    return float(found[1]) if found else 0.0


def parse_arguments(argv):
    """Take what `vllm serve` takes; what matters only to a real model is ignored."""
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--api-key", nargs="+", default=os.environ.get("VLLM_API_KEY", "").split())
    parser.add_argument("--max-model-len", default="8192")
    parser.add_argument("--uds")
    parser.add_argument("--headless", action="store_true")
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--master-addr", default="127.0.0.1")
    parser.add_argument("--master-port", type=int, default=29501)
    return parser.parse_known_args(argv[1:] if argv[:1] == ["serve"] else argv)[0]


def user_name():
    """Ask for the user's name as torch before 2.13 does: from the environment, or else the system, which has none for the uid. Raises KeyError."""
    named = (os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME"))
    return next(filter(None, named), None) or pwd.getpwuid(os.getuid()).pw_name


def die():
    """End as vLLM does: the engine says why, and the API server, at length and last, only that the engine ended."""
    prefix = "(EngineCore_DP0 pid=215) ERROR 11-27 12:00:01 [core.py:866]"
    for line in ("EngineCore failed to start.", "Traceback (most recent call last):", "RuntimeError: CUDA out of memory, says the script"):
        print(prefix, line, file=sys.stderr)
    frames = ['(APIServer pid=1)   File "/usr/lib/vllm/entrypoints/cli/main.py", line 1, in main'] * 60
    last = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
    sys.exit("\n".join(["(APIServer pid=1) Traceback (most recent call last):", *frames, f"(APIServer pid=1) {last}"]))


def main():
    arguments = parse_arguments(sys.argv[1:])
    length = int(arguments.max_model_len) if arguments.max_model_len.isdecimal() else 8192
    names = arguments.served_model_name or [arguments.model]
    model = os.path.basename(arguments.model)
    user_name()
    time.sleep(seconds_in(model, "slow"))
    if model.endswith("-dying"):
        die()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if arguments.headless:
        follow(arguments.master_addr, arguments.master_port, arguments.node_rank)
    nodes = Nodes(arguments.master_addr, arguments.master_port, arguments.nnodes - 1) if arguments.nnodes > 1 else None
    kind, address = (UnixModelServer, arguments.uds) if arguments.uds else (ModelServer, (arguments.host, arguments.port))
    server = kind(address, names, arguments.api_key, length, model, os.environ.get("VLLM_SERVER_DEV_MODE") == "1")
    server.nodes = nodes
    print(f"scripted model server: {names[0]} on {arguments.uds or f'{arguments.host}:{server.server_port}'}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
