"""What the HTML pages share: one file each, that needs no network, no other file and no JavaScript.

Its content security policy allows none of these, whatever the data say.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

# Left as they are, control characters would be dropped or replaced by the browser: shown as their Unicode pictures.
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


def shown_text(text: object) -> str:
    """HTML that shows a text as it is."""
    return escape(str(text).translate(CONTROL_PICTURES))


def data_uri(kind: str, content: bytes) -> str:
    """A picture as part of the page; `kind` as in image/jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def panel(title: str, content: str) -> str:
    """A box with a title; both are HTML."""
    return f'<section class="panel"><h2>{title}</h2>{content}</section>'


def tiles(numbers: Sequence[tuple[str, str, str]]) -> str:
    """A row of numbers: (name, value, class), the class empty, `alarm`, `good` or `flag`; all are HTML."""
    shown = "".join(
        f'<div class="tile {kind}"><b>{value}</b><span>{name}</span></div>' for name, value, kind in numbers
    )
    return f'<div class="tiles">{shown}</div>'


def write_page(path: str | os.PathLike, title: str, style: str, body: str) -> None:
    """Write a page aside, then put it in its place; the same content gives the same file.

    Args:
        style: in addition to what the pages share.
        body: HTML.
    """
    path = Path(path)
    aside = path.with_suffix(".tmp")
    page = PAGE.format(title=title, style=STYLE + style, body=body)
    # Data may hold half surrogate pairs, which are no UTF-8.
    aside.write_text(page, encoding="utf-8", errors="backslashreplace")
    os.replace(aside, path)


STYLE = """
:root { --line: #d8dde4; --bad: #cf222e; color-scheme: light; print-color-adjust: exact;
  -webkit-print-color-adjust: exact }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1640px; padding: 1.5rem; background: #f4f6f8; color: #1f2328;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif;
  overflow-wrap: anywhere }
h1 { font-size: 1.7rem; margin: 0; line-height: 1.25 }
h2 { font-size: 1.1rem; margin: 0 0 .6rem }
h3 { font-size: 1.05rem; margin: 0 }
h4 { font-size: .9rem; margin: 0 }
p { margin: .3rem 0 }
a { color: #0a5bc4 }
code { font: .93em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
header p, .files { color: #57606a }
.files { margin: 0; padding: 0; list-style: none; max-height: 9rem; overflow: auto }
.bad { color: var(--bad); font-weight: 600 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; margin: 1.1rem 0 }
.tile, .panel, .card { background: #fff; border: 1px solid var(--line); border-radius: 10px }
.tile { padding: .8rem 1rem; display: flex; flex-direction: column; justify-content: space-between }
.tile b { font-size: 1.9rem; line-height: 1.2; font-variant-numeric: tabular-nums }
.tile span { color: #57606a; font-size: .88rem }
.tile.flag { grid-column: span 2; background: #eef8f0; border-color: #a9d9b5 }
.tile.flag b { font-size: 1.25rem; user-select: all; white-space: nowrap }
.tile.alarm { background: #fff0f0; border-color: #f3b0b0 }
.tile.alarm b { color: var(--bad) }
.tile.good b { color: #1a7f37 }
.panel { padding: 1rem 1.2rem; margin: 0 0 1rem }
.panels, .contents { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 0 1rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin-bottom: 1rem }
th, td { text-align: right; padding: .2rem .4rem; border-bottom: 1px solid #e8ebef; font-weight: 400;
  white-space: nowrap }
tr:first-child th { color: #57606a; font-size: .88rem }
.card { padding: 1rem 1.2rem; margin: 0 0 1.2rem }
.badge { display: inline-block; font-size: .75rem; font-weight: 500; padding: 0 .55rem; border-radius: 1rem;
  background: #e7ecf2; color: #3d4752; white-space: nowrap }
.badge.alarm { background: #ffe3e3; color: #a40e26 }
.facts { display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; color: #57606a }
.facts b { color: #1f2328 }
"""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head><body>
{body}
</body></html>
"""
