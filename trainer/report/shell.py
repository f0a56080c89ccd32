"""The frame of a page: escaped text, tables, sections, styles, and the few lines of script that it needs."""

import base64
import hashlib
import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

_STYLE = """
:root { --ink: #1a1c1e; --soft: #5b6168; --line: #d9dce0; --paper: #fff; --panel: #f5f6f8; --mark: #fff3cf;
  --a: #0072b2; --b: #b35c00; --c: #d55e00; color-scheme: light; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --soft: #a2a9b1; --line: #3a3f45; --paper: #15171a;
  --panel: #1f2226; --mark: #453a14; --a: #56b4e9; --b: #e69f00; --c: #f0813a; color-scheme: dark; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 16px 64px; max-width: 1120px; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 8px; padding-top: 12px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 20px 0 6px; }
p { margin: 6px 0 10px; max-width: 74ch; overflow-wrap: anywhere; }
.soft, figcaption, nav { color: var(--soft); font-size: 13px; }
nav a { color: inherit; margin-right: 12px; white-space: nowrap; }
.result { display: flex; flex-wrap: wrap; gap: 8px 40px; align-items: baseline; margin: 20px 0 4px; }
.result strong { font-size: 52px; line-height: 1.1; font-weight: 650; }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(138px, 1fr)); gap: 10px; margin: 16px 0; }
dl.tiles div { background: var(--panel); border-radius: 6px; padding: 8px 12px; }
dl.tiles dt, dl.tiles .soft { color: var(--soft); font-size: 12px; line-height: 1.4; }
dl.tiles dd { margin: 0; font-size: 20px; font-variant-numeric: tabular-nums; }
dl.tiles .soft { display: block; }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 8px 0; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; min-width: 9em; }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; min-width: 4em; } tr.chosen td { background: var(--mark); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--a); }
th button::after { content: " ↕"; opacity: .4; } th[aria-sort=ascending] button::after { content: " ↑"; opacity: 1; }
th[aria-sort=descending] button::after { content: " ↓"; opacity: 1; }
pre { background: var(--panel); border-radius: 6px; padding: 10px 12px; white-space: pre-wrap; font-size: 13px;
  overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); font-size: 14px; margin: 8px 0; }
figure { margin: 8px 0; min-width: 0; } figcaption { margin-top: 2px; max-width: 74ch; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 0 24px; }
.charts h3 { margin: 8px 0 0; } .beside { display: flex; flex-wrap: wrap; gap: 8px 48px; align-items: flex-start; }
.beside > * { max-width: 100%; } .narrow { max-width: 400px; } .map { max-width: 760px; }
svg { display: block; width: 100%; height: auto; max-width: 100%; color: var(--ink);
  font: 11px system-ui, sans-serif; }
svg text { fill: currentColor; pointer-events: none; }
.end { text-anchor: end; } .middle { text-anchor: middle; } .grid { stroke: var(--line); } .soft-text { opacity: .7; }
.s0 { stroke: var(--a); } .s1 { stroke: var(--b); stroke-dasharray: 5 3; } polyline { fill: none; stroke-width: 2; }
.m0 { stroke: var(--a); } .mc { stroke: var(--c); } .cell { fill: currentColor; } svg text.on { fill: var(--paper); }
.f0 { fill: var(--a); } .f1 { fill: var(--b); } .fc { fill: var(--c); } .fe { fill: none; stroke: var(--c); }
.even { stroke: currentColor; opacity: .5; } .none { fill: transparent; }
circle.miss { stroke: currentColor; stroke-width: 1.8; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 14px 12px; margin: 12px 0; }
.cards.small { grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); }
.card { margin: 0; font-size: 12px; line-height: 1.35; overflow-wrap: anywhere; break-inside: avoid; }
.photo { display: block; position: relative; aspect-ratio: 1; background: var(--panel); border-radius: 4px;
  margin-bottom: 4px; overflow: hidden; }
.photo > span { position: absolute; inset: 0; margin: auto; max-width: 100%; max-height: 100%; }
.photo img { position: absolute; width: 100%; height: 100%; }
.photo .heat, .tip .heat { display: none; } body:has(#heat:checked) .heat { display: block; }
.card:hover .heat { display: block; } .card .soft { font-size: 11px; } .wrong { color: var(--c); }
.key { display: inline-flex; align-items: center; gap: 5px; margin-right: 14px; }
.key svg { width: 12px; height: 12px; }
.tip { position: fixed; pointer-events: none; z-index: 9; max-width: 240px; padding: 6px 8px; border-radius: 4px;
  background: var(--ink); color: var(--paper); font-size: 12px; overflow-wrap: anywhere; }
.tip img { display: block; margin-bottom: 4px; }
@media (max-width: 520px) { table { font-size: 12px; } th, td { padding-right: 9px; min-width: 6em; }
  td.n, th.n { min-width: 0; } th:not([aria-sort]) button::after { content: none; } .beside { gap: 8px; } }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --panel: #f3f3f3; --mark: #fff3cf;
  --a: #0072b2; --b: #b35c00; --c: #d55e00; color-scheme: light; } body { max-width: none; padding: 0; }
  nav, summary, .tip, th button::after { display: none; } figure, tr, .card { break-inside: avoid; }
  h2, h3 { break-after: avoid; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

_SCRIPT = """
"use strict";
document.addEventListener("click", event => {
  const button = event.target.closest("th button");
  if (!button) return;
  const head = button.closest("th"), body = head.closest("table").tBodies[0], column = head.cellIndex;
  const down = head.ariaSort ? head.ariaSort === "ascending" : head.classList.contains("n");
  for (const other of head.parentNode.cells) other.ariaSort = null;
  head.ariaSort = down ? "descending" : "ascending";
  const value = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
  const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
  body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * order(value(a), value(b))));
});
const tip = document.createElement("div");
tip.className = "tip"; tip.hidden = true;
document.body.append(tip);
const show = (event, text, source) => {
  tip.replaceChildren(text);
  if (source) tip.prepend(Object.assign(new Image(), {src: source, alt: ""}));
  tip.hidden = false;
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)) + "px";
  const above = event.clientY + 14 + tip.offsetHeight > innerHeight;
  tip.style.top = (above ? Math.max(4, event.clientY - tip.offsetHeight - 10) : event.clientY + 14) + "px";
};
const point = event => {
  const mark = event.target.closest("[data-tip]"), matrix = event.target.closest("svg[data-names]");
  if (mark) return show(event, mark.dataset.tip, mark.dataset.src);
  tip.hidden = true;
  if (!matrix) return;
  const names = JSON.parse(matrix.dataset.names), box = matrix.getBoundingClientRect();
  const at = part => names[Math.min(names.length - 1, Math.max(0, Math.floor(part * names.length)))];
  show(event, at((event.clientY - box.top) / box.height) + " → " + at((event.clientX - box.left) / box.width));
};
for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, point);  // and a tap
"""

# Control characters, halves of a character (undecodable file names), and those that turn the direction of writing.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
# Nothing is fetched, and no script runs but this one: not even if a name were not escaped.
_POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'; base-uri 'none'"


def document(title: str, body: Iterable[str]) -> str:
    """A whole HTML file, from its title (plain text) and the HTML of its body."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{text(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<link rel="icon" href="data:,">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def sections(parts: Iterable[tuple[str, str]]) -> list[str]:
    """Links to the parts of a page, then the parts: (heading, HTML) each. Empty ones are omitted."""
    full = [(heading, heading.lower().replace(" ", "-"), body) for heading, body in parts if body]
    links = "".join(f'<a href="#{anchor}">{text(heading)}</a> ' for heading, anchor, _ in full)
    blocks = [
        f'<section id="{anchor}">\n<h2>{text(heading)}</h2>\n{body}\n</section>' for heading, anchor, body in full
    ]
    return [f"<nav>{links}</nav>", *blocks]


def text(value: object, *, limit: int = 200) -> str:
    """Any value as HTML text, also for an attribute: escaped, cut in its middle if longer than `limit` characters."""
    plain = _UNSEEN.sub("\ufffd", str(value))
    if len(plain) > limit:
        plain = plain[: limit // 2] + "…" + plain[len(plain) - limit // 2 :]
    return html.escape(plain)


def number(value: Any) -> str:
    """A number with four digits, integers with separators of thousands; other values as they are. Not escaped."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return "" if value is None else str(value)
    if isinstance(value, int) or hasattr(value, "__index__"):
        return f"{value:,}"
    return "–" if math.isnan(value) else f"{value:.4g}"


def percent(share: float) -> str:
    """A share, such as 0.933, with one digit after the point; only none is 0.0% and only all is 100.0%."""
    if math.isnan(share):
        return "–"
    if 0 < share < 0.0005 or 0.9995 <= share < 1:
        return "<0.1%" if share < 0.5 else ">99.9%"
    return f"{100 * share:.1f}%"


def duration(seconds: float) -> str:
    """Seconds as a reader would say them: 0.31 s, 12.4 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    shown: Sequence[Sequence[str]] | None = None,
    chosen: int | None = None,
    sortable: bool = True,
    cap: int = 1000,
) -> str:
    """A table; columns of numbers are aligned right and sorted as numbers.

    Args:
        columns: headings.
        rows: of values, by which they are sorted.
        shown: the text of each cell, instead of `number` of its value.
        chosen: the row to mark.
        cap: rows to show at most; a line says how many are not.
    """
    kinds = ["n" if all(hasattr(row[at], "__float__") for row in rows) else "" for at in range(len(columns))]
    label = "<button>{}</button>" if sortable and len(rows) > 1 else "{}"
    head = "".join(
        f'<th class="{kind}" scope="col">{label.format(text(name))}</th>'
        for kind, name in zip(kinds, columns, strict=True)
    )
    lines = []
    for at, row in enumerate(rows[:cap]):
        cells = []
        for column, (kind, value) in enumerate(zip(kinds, row, strict=True)):
            plain = shown[at][column] if shown else number(value)
            key = f' data-v="{-1 if math.isnan(value) else float(value):.6g}"' if kind and sortable else ""
            cells.append(f'<td class="{kind}"{key}>{text(plain)}</td>' if kind else f"<td>{text(plain)}</td>")
        lines.append(f"<tr{' class=chosen' if at == chosen else ''}>{''.join(cells)}</tr>")
    rest = f'<p class="soft">Rows that are not shown: {len(rows) - cap:,}.</p>' if len(rows) > cap else ""
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>{rest}'


def folded(summary: str, body: str, *, fold: bool = True) -> str:
    """A part that the reader opens; as it is where `fold` is false."""
    return f"<details><summary>{text(summary)}</summary>\n{body}\n</details>" if fold else body
