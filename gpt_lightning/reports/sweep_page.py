"""HTML page of ``report sweep``: heat maps, metrics, and each text once."""

import html
from collections.abc import Sequence

from gpt_lightning.palette import INK
from gpt_lightning.reports.sweep import (
    GridCell,
    PlainLoopComparison,
    grid_axes,
    group_by_texts,
    setting_name,
)
from gpt_lightning.table import value_or_all

# the page's explanation of each metric; {n} is the number of texts in a cell
LEGEND = {
    "distinct-1": "number of different tokens over the number of tokens, in all {n} texts; higher is more varied",
    "distinct-2": "the same for pairs of neighboring tokens",
    "repetition": "share of the tokens that also occur among the 16 tokens before them; lower is better",
    "log-probability": "mean log-probability of the tokens under the model at temperature 1, in nats per token; "
    "closer to 0 is more likely text",
    "next-token entropy": "entropy of the prompt's next token under the setting, in nats; 0 leaves one token to choose from",
    "identical texts": "how many of the {n} texts are identical; all {n}: the setting is deterministic",
}


def html_page(
    cells: Sequence[GridCell], loop: PlainLoopComparison, caption: str, figure_png: str
) -> str:
    """A page without links to other files: the heat maps (base64 PNG), the metrics, the grid, each text once."""
    parts = []
    by_setting = {(c.temperature, c.top_k, c.top_p): c for c in cells}
    first_with_same_texts = {
        id(cell): group[0] for group in group_by_texts(cells) for cell in group[1:]
    }
    for top_p, temperatures, top_ks in grid_axes(cells):
        if top_p is not None:
            parts.append(f"<h2>top_p {top_p:g}</h2>")
        head = "".join(f"<th>top_k {value_or_all(k)}</th>" for k in top_ks)
        parts.append(f"<table class='grid'><thead><tr><th></th>{head}</tr></thead><tbody>")
        for temperature in temperatures:
            row = "".join(
                _html_cell(cell, first_with_same_texts.get(id(cell)))
                for cell in (by_setting[temperature, k, top_p] for k in top_ks)
            )
            parts.append(f"<tr><th>temperature {temperature:g}</th>{row}</tr>")
        parts.append("</tbody></table>")
    legend = "".join(
        f"<dt>{name}</dt><dd>{meaning.format(n=len(cells[0].texts))}</dd>"
        for name, meaning in LEGEND.items()
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>temperature × top_k</title><style>{_STYLE}</style></head><body>"
        f"<h1>temperature × top_k</h1><p>{html.escape(caption)}</p>"
        f"<p>Exercise 5.3: generate_simple, the plain greedy loop, {html.escape(str(loop))}.</p>"
        f"<img alt='heat maps' src='data:image/png;base64,{figure_png}'>"
        f"<h2>Metrics</h2><dl class='legend'>{legend}</dl>"
        f"<h2>Texts</h2>{''.join(parts)}</body></html>"
    )


_STYLE = (
    f"body{{font:16px/1.45 system-ui,sans-serif;margin:2em;color:{INK};background:#fff}}"
    "h1{font-size:1.6em}h2{font-size:1.25em;margin:1.6em 0 .6em}"
    "table{border-collapse:collapse}th,td{border:1px solid #999;padding:.6em;"
    "vertical-align:top;text-align:left}td{min-width:14em;max-width:26em}"
    "img{width:100%;max-width:70em}dl{display:grid;gap:0 .8em;margin:0}dd{margin:0}"
    ".legend{grid-template-columns:max-content auto;max-width:70em;gap:.3em 1.2em}"
    ".legend dt{font-weight:600}td dl{grid-template-columns:auto auto;font-size:87%}"
    "td dd{text-align:right}p{white-space:pre-wrap;margin:.5em 0}"
    ".same{font-style:italic}summary{cursor:pointer}"
    "@media print{td{min-width:0}}"
)


def _html_cell(cell: GridCell, same_as: GridCell | None) -> str:
    """One cell of the grid.

    Args:
        same_as: An earlier cell with the same texts. The page refers to it instead of repeating them.
    """
    metrics = {
        "distinct-1": f"{cell.distinct_1:.3f}",
        "distinct-2": f"{cell.distinct_2:.3f}",
        "repetition": f"{cell.repetition_rate:.3f}",
        "log-probability": f"{cell.mean_log_probability:.3f}",
        "next-token entropy": f"{cell.next_token_entropy:.3f}",
        "identical texts": cell.identical,
    }
    entries = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in metrics.items())
    if same_as is not None:
        texts = "text" if cell.deterministic else "texts"
        return f"<td><dl>{entries}</dl><p class='same'>the same {texts} as with {setting_name(same_as)}</p></td>"
    first, *others = (f"<p>{html.escape(text)}</p>" for text in dict.fromkeys(cell.texts))
    more = f"<details><summary>{len(others)} more</summary>{''.join(others)}</details>"
    return f"<td><dl>{entries}</dl>{first}{more if others else ''}</td>"
