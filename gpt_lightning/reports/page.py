"""HTML pages of the reports: one file, readable offline."""

import base64
import html
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gpt_lightning.palette import INK

if TYPE_CHECKING:
    from gpt_lightning.figure import Figure

_STYLE = (
    f"body{{font:16px/1.45 system-ui,sans-serif;margin:2em;color:{INK};background:#fff}}"
    "h1{font-size:1.6em}h2{font-size:1.25em;margin:1.6em 0 .6em}"
    "table{border-collapse:collapse}th,td{border:1px solid #999;padding:.6em;"
    "vertical-align:top;text-align:left}"
    "img{width:100%;max-width:70em}dl{display:grid;gap:0 .8em;margin:0}dd{margin:0}"
    ".legend{grid-template-columns:max-content auto;max-width:70em;gap:.3em 1.2em}"
    ".legend dt{font-weight:600}p{white-space:pre-wrap;margin:.5em 0}"
)


def html_page(title: str, caption: str, body: str, style: str = "") -> str:
    """A page without links to other files.

    Args:
        body: HTML below the title and the caption, which are text.
        style: CSS besides that of all pages.
    """
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}{style}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(caption)}</p>{body}</body></html>"
    )


def image(figure: "Figure", description: str) -> str:
    """A figure as an HTML image that contains its pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pixels = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"<img alt='{html.escape(description)}' src='data:image/png;base64,{pixels}'>"


def legend(meanings: Mapping[str, str]) -> str:
    """What each metric of the page means, as an HTML list."""
    entries = (f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in meanings.items())
    return f"<h2>Metrics</h2><dl class='legend'>{''.join(entries)}</dl>"
