"""What page/markdown.js makes of a text, without a browser: its nodes as HTML."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from servers import find_program

PAGE = Path(__file__).resolve().parents[1] / "src" / "agent" / "page"
RENDER = Path(__file__).with_name("page") / "render.mjs"
REL = 'rel="noopener noreferrer nofollow"'

Render = Callable[[list[str]], list[str]]


@pytest.fixture(scope="module")
def render(tmp_path_factory: pytest.TempPathFactory) -> Render:
    folder = tmp_path_factory.mktemp("modules")
    for file in PAGE.glob("*.js"):
        shutil.copy(file, folder)
    # Without it Node takes a file of this name for a script of the old kind.
    (folder / "package.json").write_text('{"type": "module"}')
    node = find_program("node", "nodejs")

    def run(texts: list[str]) -> list[str]:
        done = subprocess.run([node, str(RENDER), str(folder)], input=json.dumps(texts), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        shown: list[str] = json.loads(done.stdout)
        return shown

    return run


BLOCKS = {
    "plain": "<p>plain</p>",
    "one\ntwo": "<p>one<br>two</p>",
    "one\n\ntwo": "<p>one</p><p>two</p>",
    "# Title #": "<h3>Title</h3>",
    "###### Deep": "<h6>Deep</h6>",
    "#hashtag": "<p>#hashtag</p>",
    "---": "<hr>",
    "> quote\ngoes on": "<blockquote><p>quote<br>goes on</p></blockquote>",
    "- a\n- b": "<ul><li>a</li><li>b</li></ul>",
    "- a\n\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "- a\n  - b": "<ul><li>a<ul><li>b</li></ul></li></ul>",
    "3. c\n4. d": '<ol start="3"><li>c</li><li>d</li></ol>',
    "In 1987. It was": "<p>In 1987. It was</p>",
    "```py\nx < 1\n```": '<div className="code"><span className="language">py</span><pre><code>x &lt; 1</code></pre></div>',
    "```\nx < 1\n```": '<div className="code"><pre><code>x &lt; 1</code></pre></div>',
    '~~~c++ title="a"\nx\n~~~': '<div className="code"><span className="language">c++</span><pre><code>x</code></pre></div>',
    "```\nopen": '<div className="code"><pre><code>open</code></pre></div>',
    "~~~\na\n```\n~~~": '<div className="code"><pre><code>a\n```</code></pre></div>',
    "| a | b |\n|---|---|\n| 1 |": (
        '<div aria-label="Table" className="table"><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td></td></tr></tbody></table></div>'
    ),
    "a | b\nno table": "<p>a | b<br>no table</p>",
    r"""| a \| b | `c \| d` |
|:-:|--:|
| 1 \| 2 | 3 \\|""": (
        '<div aria-label="Table" className="table"><table><thead><tr><th className="center">a | b</th><th className="end"><code>c | d</code></th></tr></thead>'
        '<tbody><tr><td className="center">1 | 2</td><td className="end">3 \\</td></tr></tbody></table></div>'
    ),
    "\\[\na_1 \\, b_1\n- c\n\\]": '<div className="formula">\\[\na_1 \\, b_1\n- c\n\\]</div>',
    "$$x^2 * y * z$$": '<div className="formula">$$x^2 * y * z$$</div>',
    "so\n$$\nx\n$$\nthen": '<p>so<br><span className="formula">$$\nx\n$$</span><br>then</p>',
    "\\[ never closed\n\n- a": "<p>[ never closed</p><ul><li>a</li></ul>",
}

SPANS = {
    "*em* **strong** ***both***": "<em>em</em> <strong>strong</strong> <strong><em>both</em></strong>",
    "~~gone~~ ~one~": "<del>gone</del> ~one~",
    "snake_case_name 2 * 3 * 4": "snake_case_name 2 * 3 * 4",
    "**a *b***": "<strong>a <em>b</em></strong>",
    "**never closed": "**never closed",
    "`a*b*` ``c`d``": "<code>a*b*</code> <code>c`d</code>",
    r"\*plain\* \a": r"*plain* \a",
    r"\(a\,b \{ *c* \}\) and \, or \; stay": r'<span className="formula">\(a\,b \{ *c* \}\)</span> and \, or \; stay',
    r"$\alpha_1 + \beta_1$ for $5 and $6": r'<span className="formula">$\alpha_1 + \beta_1$</span> for $5 and $6',
    r"\(never closed *a*": "(never closed <em>a</em>",
    r"\$5 \$6$": "$5 $6$",
    "<b>&amp;</b>": "&lt;b&gt;&amp;amp;&lt;/b&gt;",
    "[name](https://a.example/x)": f'<a href="https://a.example/x" {REL}>name</a>',
    "[**b**](https://a.example/)": f'<a href="https://a.example/" {REL}><strong>b</strong></a>',
    "![alt](https://a.example/p.png)": f'<a href="https://a.example/p.png" {REL}>alt</a>',
    "see https://a.example/b.": f'see <a href="https://a.example/b" {REL}>https://a.example/b</a>.',
    "(https://a.example/b_(c))": f'(<a href="https://a.example/b_(c))" {REL}>https://a.example/b_(c))</a>',
    "<https://a.example>": f'<a href="https://a.example/" {REL}>https://a.example</a>',
    "xhttps://a.example": "xhttps://a.example",
    # None of these is an address of the web that shows where it leads.
    "[x](javascript:alert(1))": "[x](javascript:alert(1))",
    "[x](data:text/html,x)": "[x](data:text/html,x)",
    "[x](//a.example)": "[x](//a.example)",
    "[x](https://bank.example@evil.example/)": "[x](https://bank.example@evil.example/)",
}


def test_blocks(render: Render) -> None:
    assert dict(zip(BLOCKS, render(list(BLOCKS)), strict=True)) == BLOCKS


def test_spans(render: Render) -> None:
    wanted = {text: f"<p>{html}</p>" for text, html in SPANS.items()}
    assert dict(zip(SPANS, render(list(SPANS)), strict=True)) == wanted


def test_depth_is_bounded(render: Render) -> None:
    deep, nested = render([">" * 50 + " x", "".join(f"{'  ' * depth}- {depth}\n" for depth in range(20))])
    assert deep.count("<blockquote>") == 8
    assert nested.count("<ul>") == 8


def test_text_that_comes_piece_by_piece_ends_the_same(render: Render) -> None:
    """Only the last two blocks are made again while an answer grows: those before do not depend on what comes."""
    text = "# T\n\npara *em*\n\n- a\n- b\n\n| a |\n|---|\n| 1 |\n\n```\ncode\n```\n\nend"
    whole = render([text])[0]
    grown = render([text[:length] for length in range(1, len(text) + 1)])
    assert grown[-1] == whole
    assert all(shown.startswith("<h3>T</h3><p>para <em>em</em></p>") for shown in grown[25:])


def test_no_text_takes_long(render: Render) -> None:
    started = time.monotonic()
    render(
        [piece * (20_000 // len(piece)) for piece in ("*a ", "[", "`", "_a ", "![a](", "> ", "|a|\n|-|\n", "<h", "\\(", "$", "$$", "$a ", "\\[\na\n", "\\|")]
    )
    assert time.monotonic() - started < 20
