"""Pieces of an HTML page. Whatever comes from data is escaped here, and nothing is fetched from anywhere: the page says so itself."""

from __future__ import annotations

import base64
import html
import io
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Html", "bullets", "details", "figure", "number", "page", "paragraph", "pre", "section", "table", "uncertain"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6470; --paper: #ffffff; --panel: #f4f6f8; --line: #d9dee3; --accent: #0063a6;
  --good: #0a6b4b; --bad: #a33b00; --level: #6a5300; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3acb6; --paper: #14181c; --panel: #1e242a; --line: #38414a;
  --accent: #6cb8f0; --good: #5fd0a5; --bad: #ff9d6b; --level: #e3c65f; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 58rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.4rem 0 0.6rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 0.5rem; padding-top: 0.6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.4rem 0 0.4rem; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 0.3rem 1rem; font-size: 0.92rem; margin: 0.6rem 0 1rem; }
.lead { font-size: 1.05rem; }
.soft { color: var(--soft); font-size: 0.92rem; }
.box { background: var(--panel); border-left: 4px solid var(--line); border-radius: 4px; padding: 0.5rem 0.9rem; margin: 0.6rem 0; }
.ahead { border-color: var(--good); } .behind, .warning { border-color: var(--bad); } .level, .unknown { border-color: var(--level); }
.wide { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.28rem 0.45rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); white-space: nowrap;
  overflow-wrap: normal; }
th { white-space: normal; vertical-align: bottom; min-width: 3.6rem; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 7.5rem; padding-left: 0; position: sticky; left: 0;
  background: var(--paper); }
table.words td, table.words th { text-align: left; white-space: normal; }
table.words td { min-width: 6rem; }
tr.own td { font-weight: 650; }
figure { margin: 0.9rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff; border-radius: 6px; }
figcaption { color: var(--soft); font-size: 0.92rem; margin-top: 0.3rem; }
pre { background: var(--panel); padding: 0.7rem 0.9rem; border-radius: 4px; overflow-x: auto; font-size: 0.85rem; }
details summary { cursor: pointer; color: var(--accent); }
@media (min-width: 48rem) { .scores { font-size: 0.84rem; } .scores td:first-child { min-width: 10.5rem; }
  .scores th, .scores td { padding: 0.28rem 0.3rem; } }
@media (max-width: 40rem) { .scores td:first-child { min-width: 6rem; max-width: 7.5rem; }
  figure .picture { overflow-x: auto; } figure.broad img { max-width: none; width: 40rem; } }
@media print { body { max-width: none; } nav { display: none; } h2 { break-after: avoid; } figure, table, .box { break-inside: avoid; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Html(str):
    """Be text that is HTML already; every other text is escaped where it goes into the page."""

    __slots__ = ()


def text(value: Any) -> str:
    """Return a value as HTML.

    Example:
        >>> text("a < b"), text(Html("<b>a</b>"))
        ('a &lt; b', '<b>a</b>')
    """
    return value if isinstance(value, Html) else html.escape("".join(c if c.isprintable() or c == "\n" else " " for c in str(value)))


def paragraph(*parts: Any, kind: str = "") -> Html:
    """Return a paragraph, of a class of the style."""
    return Html(f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{''.join(text(part) for part in parts)}</p>")


def bullets(items: Iterable[Any]) -> Html:
    """Return a list."""
    return Html("<ul>" + "".join(f"<li>{text(item)}</li>" for item in items) + "</ul>")


def pre(content: str) -> Html:
    """Return text whose lines are kept."""
    return Html(f"<pre>{text(content)}</pre>")


def details(summary: str, *parts: Html) -> Html:
    """Return what is folded away."""
    return Html(f"<details><summary>{text(summary)}</summary>{''.join(parts)}</details>")


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], own: int = -1, kind: str = "") -> Html:
    """Return a table that scrolls sideways where it is too wide; row number `own` stands out."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    lines = [
        f"<tr{' class=own' if i == own else ''}>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for i, row in enumerate(rows)
    ]
    return Html(
        f'<div class="wide" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def figure(fig: Figure, words: str, broad: bool = False, dpi: int = 110) -> Html:
    """Return a picture inside the page, with its caption; a broad one can be moved sideways on a phone."""
    buffer = io.BytesIO()
    # Characters that the font lacks are drawn as boxes; the names stand in the text as well.
    with warnings.catch_warnings(action="ignore"):
        fig.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    image = f'<img alt="{text(words)}" src="data:image/png;base64,{data}">'
    kind = ' class="broad"' if broad else ""
    return Html(f'<figure{kind}><div class="picture">{image}</div><figcaption>{text(words)}</figcaption></figure>')


def section(name: str, title: str, *parts: Html) -> tuple[str, str, Html]:
    """Return a section: its name in addresses, its title, and what is in it."""
    return name, title, Html("".join(parts))


def page(title: str, top: Html, sections: Sequence[tuple[str, str, Html]]) -> str:
    """Return the whole page."""
    links = "".join(f'<a href="#{name}">{text(heading)}</a>' for name, heading, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{text(heading)}</h2>{content}</section>' for name, heading, content in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{text(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><header><h1>{text(title)}</h1>{top}<nav>{links}</nav></header><main>{body}</main></body></html>\n"
    )


def number(value: float, digits: int = 3) -> str:
    """Return a number with some significant digits and a proper minus sign; a dash where there is none.

    Example:
        >>> number(0.012345), number(float("nan")), number(1234.5), number(-2.0)
        ('0.0123', '–', '1234', '−2.00')
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    found = f"{value:.{digits - 1}e}" if size < -4 or size > 6 else f"{value:.{max(digits - 1 - size, 0)}f}"
    return found.replace("-", "−")


def uncertain(mean: float, se: float, scale: float = 1.0) -> str:
    """Return a mean and its standard error, with as many decimals as the error deserves.

    Example:
        >>> uncertain(-1.23456, 0.0123), uncertain(12.3, float("nan"))
        ('−1.235 ± 0.012', '12.3')
    """
    mean, se = scale * mean, scale * se
    if not math.isfinite(mean) or not math.isfinite(se) or se <= 0:
        return number(mean)
    decimals = min(max(1 - math.floor(math.log10(se)), 0), 6)
    return f"{mean:.{decimals}f} ± {se:.{decimals}f}".replace("-", "−")
