"""What a test asks of a page: well-formed, complete in itself, which headings, which words."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

_VOID = {"meta", "img", "br", "hr", "link", "input", "source"}


class Page(HTMLParser):
    """Parses a page; AssertionError for a tag that closes another one, or for one that stays open."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        # Everything that src, href or srcset name.
        self.headings: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.css = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "poster")
        ]
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> does not close the last tag"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.css += data
            return
        if "h2" in self.open:
            self.headings[-1] += data
        self.words += data

    def needs_nothing_else(self) -> bool:
        """No address of anything outside the file, no script."""
        is_inside = all(source.startswith("data:") for source in self.sources)
        return (
            is_inside and "script" not in self.tags and "url(" not in self.css and "@import" not in self.css
        )
