"""A headless Chromium, and a stand-in for nginx between it and the service: a login, and a line that can be cut."""

import base64
import http.client
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from servers import PROXY_SECRET, find_program

USER, PASSWORD = "ada", "p@ss:w/rd"
LOGIN = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
HOP_BY_HOP = {"connection", "content-length", "transfer-encoding"}


class Gateway(ThreadingHTTPServer):
    """Asks for a password, tells the service who it was, and streams."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = port
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.open: set[socket.socket] = set()
        self.refusing = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def paths(self, method: str) -> list[str]:
        return [path for each, path, _ in self.seen if each == method]

    def cut(self) -> None:
        """Break every answer that is on its way, as a lost network does."""
        for connection in list(self.open):
            # A linger of zero makes close() send RST instead of FIN.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser hangs up when it likes."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gateway

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        if self.headers.get("Authorization") != LOGIN:
            return self.plain(401, {"WWW-Authenticate": 'Basic realm="agent"'})
        if self.server.refusing:
            return self.plain(502, {})
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "authorization"}
        headers |= {"X-Forwarded-User": USER, "X-Proxy-Secret": PROXY_SECRET, "Connection": "close"}
        try:
            upstream.request(self.command, self.path, body, headers)
            self.relay(upstream.getresponse())
        finally:
            upstream.close()
        return None

    do_POST = do_PATCH = do_DELETE = do_PUT = do_GET

    def relay(self, answer: http.client.HTTPResponse) -> None:
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        if answer.status in (204, 304):
            return self.end_headers()
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.server.open.add(self.connection)
        try:
            while piece := answer.read1(65536):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        finally:
            self.server.open.discard(self.connection)
        return None

    def plain(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()


def start_chromium() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = find_program("chromium", "chromium")
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")
    # Whatever the page or the browser may want from elsewhere is not found.
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # the sandbox refuses to run as root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(find_program("chromedriver", "chromium-driver"))
    return webdriver.Chrome(options, service)


class Page:
    """The chat page in a tab of its own, driven as a person does: by keys and clicks."""

    def __init__(self, driver: webdriver.Chrome, gateway: Gateway) -> None:
        self.driver = driver
        self.gateway = gateway
        self.url = f"http://{USER}:p%40ss%3Aw%2Frd@{gateway.address}/"
        old = driver.current_window_handle
        driver.switch_to.new_window("tab")
        new = driver.current_window_handle
        driver.switch_to.window(old)
        driver.close()
        driver.switch_to.window(new)
        self.cdp("Storage.clearDataForOrigin", origin=f"http://{gateway.address}", storageTypes="all")
        self.driver.get_log("performance")
        self.driver.get_log("browser")
        self.size(1280, 900)
        self.media()

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def size(self, width: int, height: int, phone: bool = False) -> None:
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=phone)

    def media(self, scheme: str = "light", motion: str = "no-preference") -> None:
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": n, "value": v} for n, v in features.items()])

    def open(self, rest: str = "") -> "Page":
        self.driver.get(self.url + rest)
        self.until(lambda: self.js("return document.readyState") == "complete", "the page loads")
        return self

    def until(self, true: Callable[[], Any], what: str, seconds: float = 15) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := true()):
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not within {seconds} s. The page shows:\n{self.shown('body')}\n{self.console()}")
            time.sleep(0.03)
        return value

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str) -> WebElement:
        return self.until(lambda: self.all(css), f"{css} is there")[0]

    def shown(self, css: str) -> str:
        """The text that a person sees there, "" where there is nothing."""
        return self.js(f"return document.querySelector({json.dumps(css)})?.innerText ?? ''")

    def texts(self, css: str) -> list[str]:
        return self.js(f"return [...document.querySelectorAll({json.dumps(css)})].map((node) => node.innerText)")

    def shows(self, text: str, css: str = "#turns", seconds: float = 15) -> None:
        self.until(lambda: text in self.shown(css), f"{css} shows {text!r}", seconds)

    def click(self, css: str) -> None:
        self.one(css).click()

    def keys(self, *keys: str) -> None:
        """Press keys wherever the focus is."""
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def chord(self, holding: str, key: str) -> None:
        webdriver.ActionChains(self.driver).key_down(holding).send_keys(key).key_up(holding).perform()

    def write(self, text: str) -> None:
        """Put a text into the message field. By script: the driver's keys know only some characters."""
        self.js(
            "const field = document.getElementById('message'); field.value = arguments[0];"
            "field.dispatchEvent(new Event('input', {bubbles: true})); field.focus();",
            text,
        )

    def send(self, text: str) -> None:
        self.write(text)
        self.keys(Keys.ENTER)

    def say(self, text: str) -> str:
        """Send a message and return the answer, complete."""
        before = len(self.all(".turn"))
        self.send(text)
        self.until(lambda: len(self.all(".turn")) > before, "the message is shown")
        self.idle()
        return self.texts(".turn")[-1]

    def idle(self) -> None:
        self.until(lambda: self.js("return document.getElementById('stop').hidden"), "the answer ends", 30)

    def focus(self) -> str:
        return self.js("const at = document.activeElement; return at.id || at.textContent || at.tagName")

    def thread(self) -> str:
        return self.js("return location.hash.slice(1)")

    def console(self) -> list[dict[str, Any]]:
        return [entry for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requested(self) -> list[str]:
        """The addresses that the page asked for since it was asked for the last time."""
        entries = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
