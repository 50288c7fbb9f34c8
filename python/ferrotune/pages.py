"""What pages of HTML have in common: self-contained, without scripts, light and dark."""

import base64
import html
from collections.abc import Iterable, Sequence

STYLE = """
.ft-page{--ink:#1c1f23;--soft:#5d6670;--line:#e2e5e9;--card:#fff;--bar:#0072b2;--ok:#009e73;
--note:#0072b2;--warning:#b45f06;--stop:#c0272d;color:var(--ink);font:15px/1.5 system-ui,sans-serif;
max-width:1000px;margin:0 auto;text-align:left}
@media(prefers-color-scheme:dark){.ft-page{--ink:#e8eaed;--soft:#a2abb5;--line:#3a4046;
--card:#22262a;--bar:#56b4e9;--ok:#3cc79b;--note:#56b4e9;--warning:#f0a04b;--stop:#ff6b6b}}
.ft-page h1{font-size:24px;margin:0 0 4px}.ft-page h2{font-size:16px;margin:0}
.ft-page p{margin:4px 0}.ft-page .soft{color:var(--soft);font-size:13px}
.ft-page .sums{display:flex;gap:10px;flex-wrap:wrap;margin:14px 0}
.ft-page .sum{border:1px solid var(--line);border-radius:8px;padding:6px 14px;
background:var(--card)}
.ft-page .sum b{font-size:20px;margin-right:6px}
.ft-page .card{border:1px solid var(--line);border-left:5px solid var(--tone);border-radius:6px;
background:var(--card);padding:10px 16px;margin:10px 0}
.ft-page .card h2 span{float:right;color:var(--tone);font-weight:600}
.ft-page .plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:14px}
.ft-page .plot{border:1px solid var(--line);border-radius:6px;background:var(--card);
padding:10px 16px}
.ft-page table{border-collapse:collapse;width:100%;font-size:13px;margin:6px 0}
.ft-page td{border-top:1px solid var(--line);padding:3px 10px 3px 0;vertical-align:top;
text-align:left;overflow-wrap:anywhere}
.ft-page td.place{white-space:nowrap;color:var(--soft);width:1%}
.ft-page td.note{color:var(--tone);width:28%}
.ft-page svg{width:100%;height:auto;display:block}
.ft-page svg text{fill:var(--soft);font-size:11px}.ft-page svg rect{fill:var(--bar)}
.ft-page summary{cursor:pointer;color:var(--soft);font-size:13px}
.ft-page .fine{columns:2;column-gap:30px;font-size:14px;padding-left:18px}
"""


def document(title: str, body: str) -> str:
    """A whole page around `body`, whose own style begins with STYLE."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>body{{margin:24px;background:#f6f7f9}}"
        "@media(prefers-color-scheme:dark){body{background:#17191c}}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def figures(pairs: Sequence[tuple[str, str]]) -> str:
    """Large numbers, each with what it counts beside it."""
    cells = (f'<div class="sum"><b>{number}</b>{name}</div>' for number, name in pairs)
    return f'<div class="sums">{"".join(cells)}</div>'


def image(content: bytes, what: str) -> str:
    """A PNG file as a part of the page."""
    encoded = base64.b64encode(content).decode()
    return f'<img alt="{what}" src="data:image/png;base64,{encoded}">'


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of numbers under a header."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = []
    for first, *rest in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        body.append(f"<tr><th>{html.escape(first)}</th>{cells}</tr>")
    return f'<div class="scroll"><table class="grid"><tr>{head}</tr>{"".join(body)}</table></div>'


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    body = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table>{body}</table>" if body else ""
