"""A reader of POST /chat/stream, and of what takes up one that broke."""

import json
import threading
from typing import Any

import httpx

from servers import Agent, wait_until

Event = tuple[int, str, Any]


class Stream:
    """A reader of POST /chat/stream in a thread of its own."""

    def __init__(self, service: Agent, body: dict[str, Any] | None = None, run_id: str = "", after: int = 0) -> None:
        self.events: list[Event] = []
        self.broken = False
        self._service = service
        self._body = body
        self._run_id = run_id
        self._after = after
        self._enough: int | None = None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        method, path = ("POST", "/chat/stream") if self._body else ("GET", f"/chat/stream/{self._run_id}")
        headers = {"Last-Event-ID": str(self._after)} if self._after else {}
        try:
            with self._service.client.stream(method, path, json=self._body, headers=headers, timeout=30) as answer:
                assert answer.status_code == 200, answer.read()
                fields: dict[str, str] = {}
                for line in answer.iter_lines():
                    name, _, value = line.partition(": ")
                    if line:
                        fields[name] = value
                    elif "event" in fields:
                        self.events.append((int(fields.get("id", 0)), fields["event"], json.loads(fields["data"])))
                        fields = {}
                        if self._enough is not None and len(self.texts()) >= self._enough:
                            return
        except httpx.TransportError:
            self.broken = True

    def break_after(self, tokens: int) -> None:
        self._enough = tokens
        self.join()

    def join(self) -> "Stream":
        self._thread.join(40)
        assert not self._thread.is_alive()
        return self

    def names(self) -> list[str]:
        return [name for _, name, _ in self.events]

    def data(self, name: str) -> Any:
        return next((data for _, event, data in self.events if event == name), None)

    def texts(self) -> list[str]:
        return [data["text"] for _, name, data in self.events if name == "token"]

    @property
    def run_id(self) -> str:
        wait_until(lambda: self.data("run") is not None, "the run is named")
        return self.data("run")["run_id"]

    @property
    def last_id(self) -> int:
        return self.events[-1][0]
