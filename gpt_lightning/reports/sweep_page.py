"""HTML page of ``report sweep``: heat maps, metrics, and each text once."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpt_lightning.reports.page import html_page, image, legend
from gpt_lightning.reports.sweep import (
    GridCell,
    PlainLoopComparison,
    grid_axes,
    group_by_texts,
    setting_name,
)
from gpt_lightning.table import value_or_all

if TYPE_CHECKING:
    from gpt_lightning.figure import Figure

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


def sweep_page(
    cells: Sequence[GridCell], loop: PlainLoopComparison, caption: str, figure: "Figure"
) -> str:
    """A page with the heat maps, the metrics, the grid, and each text once."""
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
    meanings = {name: text.format(n=len(cells[0].texts)) for name, text in LEGEND.items()}
    return html_page(
        "temperature × top_k",
        caption,
        f"<p>Exercise 5.3: generate_simple, the plain greedy loop, {html.escape(str(loop))}.</p>"
        f"{image(figure, 'heat maps')}{legend(meanings)}<h2>Texts</h2>{''.join(parts)}",
        _STYLE,
    )


_STYLE = (
    "td{min-width:14em;max-width:26em}td dl{grid-template-columns:auto auto;font-size:87%}"
    "td dd{text-align:right}.same{font-style:italic}summary{cursor:pointer}"
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
