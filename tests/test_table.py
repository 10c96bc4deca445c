"""Tables and figures of the Python API, as a notebook shows them."""

import html
import re
from dataclasses import dataclass, replace

import pytest
import torch

from gpt_lightning.figure import Figure
from gpt_lightning.generation.sampling import SamplingParams
from gpt_lightning.reports import comparison_results, sampling, sweep
from gpt_lightning.table import MAX_ROWS, Table, html_table
from helpers import tiny_gpt2_vocabulary

PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Named:
    name: str

    def as_text(self) -> dict[str, str]:
        return {"name": self.name}


def cells(table: str) -> list[list[str]]:
    """The texts of an HTML table, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [
        [html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows
    ]


def test_table_is_a_list_of_its_rows() -> None:
    rows = [Named(letter) for letter in "abc"]
    table = Table(rows)
    assert (table, repr(table), table[1], table[-1]) == (rows, repr(rows), rows[1], rows[2])
    assert cells(table[1:]._repr_html_()) == [["name"], ["b"], ["c"]]
    assert cells(table[:0]._repr_html_()) == []


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a & b", '"', "</td>"])
def test_text_of_a_cell_is_escaped(text: str) -> None:
    shown = Table([Named(text)])._repr_html_()
    assert cells(shown) == [["name"], [text]]
    assert re.findall("<[^>]*>", shown) == re.findall("<[^>]*>", html_table([{"name": ""}]))


def test_characters_that_a_message_cannot_have_are_escaped() -> None:
    """A byte of a path that is not UTF-8, and a control character."""
    shown = html_table([{"model": "a\udcff\x1b[31m"}])
    assert "<td>a\\udcff\\x1b[31m</td>" in shown
    shown.encode()


def test_long_table_is_cut() -> None:
    table = Table([Named(str(i)) for i in range(MAX_ROWS + 1001)])
    shown = table._repr_html_()
    assert len(cells(shown)) == 1 + MAX_ROWS
    assert "and 1,001 more rows" in shown


def test_reports_return_tables_with_the_columns_of_the_terminal() -> None:
    logits = torch.tensor(sampling.BOOK_LOGITS)
    rows, distributions = sampling.frequencies(logits, sampling.BOOK_TOKENS, sweep.grid([5.0]))
    shown = cells(rows._repr_html_())
    assert shown[0] == [name for name in rows[0].as_text() if name not in ("top_k", "top_p")]
    assert ["5", "pizza", "4.2998%", "43.0", "32", "27 – 60", "-1.71"] in shown
    assert cells(distributions._repr_html_())[0][:2] == ["temperature", "entropy (nats)"]
    timings = sampling.compare_estimators(logits, 5.0, num_samples=10, seed=1)
    assert [row[0] for row in cells(timings._repr_html_())[1:]] == [t.name for t in timings]

    grid = sweep.grid([0.0, 1.0], [1, None])
    assert grid == [SamplingParams(t, k) for t in (0.0, 1.0) for k in (1, None)]
    found = sweep.sweep(
        tiny_gpt2_vocabulary(), [1, 2], grid, num_samples=2, max_new_tokens=2, seed=1
    )
    shown = cells(found._repr_html_())
    assert shown[0][:3] == ["temperature", "top_k", "distinct-1"]  # no top_p
    assert [row[:2] for row in shown[1:]] == [["0", "1"], ["0", "all"], ["1", "1"], ["1", "all"]]
    assert shown[1][-1] == "all 2"


MEASURED = comparison_results.ModelMeasurement(
    "a/b", 2_000_000, 500_000, None, 5.0, 6.0, 148.4, 403.4, 1.0, 0.02, 50.0, 300_000_000
)


def test_models_are_a_table() -> None:
    table = Table([MEASURED, replace(MEASURED, skipped="too large", val_loss=None)])
    head, first, second = cells(table._repr_html_())
    assert dict(zip(head, first, strict=True)) == MEASURED.as_text()
    assert first[:3] == ["a/b", "0.5 M", "2 MB"]
    assert second[head.index("val loss")] == ""


def test_figures_are_shown_without_pyplot() -> None:
    rows, _ = sampling.frequencies(torch.tensor([1.0, 2.0]), ["a", "b"], sweep.grid([1.0, 2.0]))
    figures = [
        sampling.sampling_figure(rows, 1000),
        comparison_results.comparison_figure([MEASURED]),
    ]
    for figure in figures:
        assert isinstance(figure, Figure)
        assert figure._repr_png_().startswith(PNG)


def test_figure_without_a_caption_has_no_space_for_it() -> None:
    rows, _ = sampling.frequencies(torch.tensor([1.0, 2.0]), ["a", "b"], sweep.grid([1.0]))

    def bottom(caption: str) -> float:
        figure = sampling.sampling_figure(rows, 1000, caption)
        figure._repr_png_()
        return float(figure.axes[0].get_position().y0)

    assert bottom("") < bottom("some settings")
