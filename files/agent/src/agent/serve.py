"""`python -m agent.serve`: the service as its image starts it, AGENT_WORKERS processes on one port.

A worker that dies is replaced, and the others go on with what it was working on. Workers are forked when everything is
imported already, which takes seconds: the next one is there at once, and they share that memory.
"""

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from types import FrameType

import uvicorn

from agent import logs
from agent.metrics import DIRECTORY, prepare_directory
from agent.settings import Settings, SettingsError

logger = logging.getLogger(__name__)

# Outlasts that of the proxy in front, which must be the one to close.
KEEP_ALIVE_SECONDS = 75
GRACEFUL_SECONDS = 30
BACKLOG = 2048
# A worker that dies younger than this is not replaced at once: something may be wrong with all of them.
YOUNG_SECONDS = 1.0
STARTUP_FAILURE = 3  # how uvicorn leaves where the application does not start
PR_SET_PDEATHSIG = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    wanted = parser.parse_args()
    logs.configure()
    try:
        workers = Settings.from_environment(os.environ).workers
    except SettingsError as error:
        raise SystemExit(f"agent: bad settings\n{error}") from None
    if DIRECTORY not in os.environ:
        os.environ[DIRECTORY] = os.path.join(tempfile.gettempdir(), f"agent-metrics-{wanted.port}")
    prepare_directory(dict(os.environ))
    listener = _listen(wanted.host, wanted.port)
    if workers == 1:
        _serve(listener)
    else:
        sys.exit(Supervisor(listener, workers).run())


class Supervisor:
    """Keeps so many workers running. Nothing but this happens in its process."""

    def __init__(self, listener: socket.socket, workers: int) -> None:
        self._listener = listener
        self._wanted = workers
        self._workers: dict[int, float] = {}
        self._stopping = False

    def run(self) -> int:
        import agent.app  # noqa: F401  so that the workers have it

        gc.collect()
        gc.freeze()  # or the first collection in a worker copies every page that they share
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        for _ in range(self._wanted):
            self._fork()
        while self._workers:
            pid, status = os.wait()
            started = self._workers.pop(pid, 0.0)
            code = os.waitstatus_to_exitcode(status)
            if self._stopping:
                continue
            logger.warning("a worker died", extra={"pid": pid, "code": code})
            if code == STARTUP_FAILURE:
                self._stop(signal.SIGTERM, None)
                return STARTUP_FAILURE
            if time.monotonic() - started < YOUNG_SECONDS:
                time.sleep(YOUNG_SECONDS)
            self._fork()
        return 0

    def _fork(self) -> None:
        if self._stopping:
            return
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self._workers[pid] = time.monotonic()
            return
        code = 1
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                _serve(self._listener)
                code = 0
        except SystemExit as leaving:
            # Words instead of a number say why it cannot start; the next worker could not either.
            if isinstance(leaving.code, str):
                print(leaving.code, file=sys.stderr, flush=True)
                code = STARTUP_FAILURE
            else:
                code = leaving.code or 0
        except BaseException:
            logger.exception("a worker failed")
        finally:
            sys.stdout.flush()
            os._exit(code)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        for pid in list(self._workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise SystemExit(f"agent: cannot listen on {host}:{port}: {error}") from None
    return listener


def _serve(listener: socket.socket) -> None:
    config = uvicorn.Config(
        "agent.app:from_environment",
        factory=True,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACEFUL_SECONDS,
    )
    server = uvicorn.Server(config)
    server.run(sockets=[listener])
    if not server.started:
        sys.exit(STARTUP_FAILURE)


if __name__ == "__main__":
    main()
