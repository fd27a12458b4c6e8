"""Write a picture of the chat page: `python tests/screenshot.py PICTURE.png`.

The service and the browser are real, the model reads from here.
"""

import importlib.util
import sys
import threading
from pathlib import Path
from typing import Any

from browser import Gateway, Page, start_chromium
from servers import MODEL_SERVER, Agent, Postgres, Redis, environment, free_port, migrate

MAX_BYTES = 300_000
SIZE = (1280, 800)

EARLIER = [
    "Summarise Monday's meeting",
    "Why is the backup slower on Sundays?",
    "Rename the staging hosts",
]
QUESTION = "Our disk grows by 37 GB a week and 412 GB of 2 TB are used. How long will it last, and how do I check it?"
CALL = ("calculator", '{"expression": "(2000 - 412) / 37"}')
ANSWER = """It will last about **43 weeks**, if growth stays as it is:

| now | limit | growth | left |
|---|---|---|---|
| 412 GB | 2,000 GB | 37 GB a week | 42.9 weeks |

To check it on the host:

1. See what is used now:

   ```sh
   df -h /var/lib/docker
   ```
2. Find what grows: `du -xh --max-depth=2 / | sort -h | tail`
3. Warn *before* it is full: alert at 80 %, which is in about **32 weeks**.
"""


def scripted_model(port: int) -> Any:
    """The tests' model server, with answers of its own."""
    spec = importlib.util.spec_from_file_location("model_server", MODEL_SERVER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def generate(handler: Any, body: dict[str, Any]) -> None:
        last = body["messages"][-1]
        asked = module.text_of(last) == QUESTION and last["role"] == "user"
        name, arguments = CALL
        calls = [{"id": "call-1", "type": "function", "function": {"name": name, "arguments": arguments}}]
        text = ANSWER if last["role"] == "tool" else "Done."
        answer = {"id": "answer", "created": 0, "model": body["model"]}
        usage = {"prompt_tokens": 611, "completion_tokens": 164, "total_tokens": 775}
        pieces = [] if asked else [text]
        handler.stream(answer, pieces, calls if asked else [], "tool_calls" if asked else "stop", usage, 0, False)

    module.Handler.generate = generate
    server = module.ModelServer(("127.0.0.1", port), ["agent-model"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class Model:
    def __init__(self) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.server = scripted_model(port)


def main(picture: Path) -> None:
    model, postgres, redis = Model(), Postgres(), Redis()
    started: list[Any] = [postgres, redis]
    try:
        migrated = migrate(environment(postgres, redis, model, postgres.directory))
        if migrated.returncode:
            sys.exit(migrated.stderr)
        agent = Agent(postgres, redis, model)
        started.append(agent)
        agent.start()
        draw(Gateway(agent.port), picture)
    finally:
        for server in reversed(started):
            server.remove()


def draw(gateway: Gateway, picture: Path) -> None:
    driver = start_chromium()
    try:
        page = Page(driver, gateway)
        page.size(*SIZE)
        page.open()
        for text in EARLIER:
            page.say(text)
            page.click("#new")
        page.say(QUESTION)
        page.until(lambda: page.shown(".tool .short"), "the arguments are shown")
        page.click(".tool summary")
        page.until(lambda: len(page.all("#threads li")) == len(EARLIER) + 1, "all threads are listed")
        page.js("document.getElementById('conversation').scrollTop = 0; document.activeElement.blur()")
        png = driver.get_screenshot_as_png()
    finally:
        driver.quit()
    if len(png) > MAX_BYTES:
        sys.exit(f"{picture}: {len(png)} bytes are more than {MAX_BYTES}")
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(png)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
