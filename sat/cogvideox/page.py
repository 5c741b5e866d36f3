"""Pages of HTML in one file, without scripts or addresses: what the gallery, the demo's and the runs' reports share."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

_KINDS = {".mp4": "video/mp4", ".png": "image/png", ".gif": "image/gif", ".jpg": "image/jpeg"}


class Html(str):
    """Text that is HTML already. Any other string is escaped where it enters a page."""


def page(title: str, body: str, style: str) -> str:
    """A whole page. body: HTML; style: CSS."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def data_url(path: Path) -> str:
    """The file itself as an address."""
    return f"data:{_KINDS[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def picture(path: Path, text: str, kind: str = "") -> Html:
    """text: for those who cannot see it. kind: the element's class."""
    return Html(f'<img class="{kind}" alt="{escape(text)}" src="{data_url(path)}">')


def text(value: object) -> str:
    """Escaped, unless it is ``Html``."""
    return value if isinstance(value, Html) else escape(str(value))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "") -> Html:
    """The first cell of a row is its heading. Wide ones scroll by themselves."""
    top = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>{"".join(f"<td>{text(c)}</td>" for c in row[1:])}</tr>'
        for row in rows
    )
    thead = f"<thead><tr>{top}</tr></thead>" if head else ""
    return Html(f'<div class="scroll"><table class="{kind}">{thead}<tbody>{lines}</tbody></table></div>')


def section(title: str, *parts: object) -> Html:
    return Html(f"<section><h2>{escape(title)}</h2>{''.join(map(text, parts))}</section>\n")


def note(words: object) -> Html:
    return Html(f"<p>{text(words)}</p>")


def folded(title: object, *parts: object, is_open: bool = False) -> Html:
    """Behind a line that opens it."""
    state = " open" if is_open else ""
    return Html(f"<details{state}><summary>{text(title)}</summary>{''.join(map(text, parts))}</details>")


def verbatim(words: str) -> Html:
    return Html(f"<pre>{escape(words)}</pre>")


STYLE = """
:root {
  color-scheme: light dark;
  --paper: light-dark(#f6f7f9, #14161a);
  --card: light-dark(#ffffff, #1d2026);
  --ink: light-dark(#1b1f27, #e7e9ee);
  --faint: light-dark(#5c6675, #98a1b3);
  --line: light-dark(#e2e5eb, #2e333d);
  --bar: light-dark(#dbe6fb, #24375c);
  --right: light-dark(#0f7b4a, #5fd39b);
  --wrong: light-dark(#b42318, #ff8f85);
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 48px 0 4px; }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 10px; }
p { margin: 0 0 14px; max-width: 76ch; color: var(--faint); }
.small { font-size: 13px; margin-top: 14px; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; background: var(--card); border: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px; text-align: left; border-bottom: 1px solid var(--line); font-weight: 400;
  white-space: nowrap; }
thead th { color: var(--faint); font-size: 13px; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; }
.right { color: var(--right); }
.wrong { color: var(--wrong); }
details { margin-top: 8px; }
summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  font-size: 12px; }
"""
