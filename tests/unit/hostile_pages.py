"""Texts that try to be more than text, and what a page is made of when it is read by machine."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

HOSTILE = [
    "<script>alert(1)</script>",
    "</code></pre><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "<!-- ",
    "]]> <![CDATA[",
    "&lt;b&gt; &#60;i&#62; &amp;",
    "[click](https://evil.example) ![i](https://evil.example/i.png)",
    "<https://evil.example> https://evil.example www.evil.example a@evil.example",
    "[ref]: https://evil.example\n\n[ref]",
    "```\n# out\n```",
    "~~~\n``````````\n<b>out</b>\n~~~",
    "a | b || c \\| d \\\\| e",
    "`tick` ``two`` |",
    "- item\n1. item\n> quote\n# head\n---\n***",
    "| a | b |\n| - | - |\n| 1 | 2 |",
    "$\\frac{1$ $$x$$ {{ 7 * 7 }} {% raw %} ${7*7}",
    "\x1b[2J\x1b]0;title\x07 \x00 \r\n \x85 \u2028 \x0b",
    "\u202eabc\u2066 \ufeff \ud83d half",
    "</style><style>*{display:none}",
    "",
    " ",
    "\n",
    "\\",
]


class Structure(HTMLParser):
    """Tags with their attributes' names, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.others: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    def handle_pi(self, data: str) -> None:
        self.others.append(data)

    def unknown_decl(self, data: str) -> None:
        self.others.append(data)


def markdown_tokens(text: str) -> list[Any]:
    markdown_it = pytest.importorskip("markdown_it")
    tokens = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    return [inner for token in tokens for inner in (token, *(token.children or ()))]
