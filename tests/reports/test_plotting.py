"""Figures: readable labels, colors and captions."""

import re
from itertools import combinations
from typing import Any

import pytest
import torch
from matplotlib.colors import to_hex

from gpt_lightning import palette
from gpt_lightning.reports import comparison_results, plotting, sampling, sweep
from gpt_lightning.training.run_files import loss_figure


def boxes(figure: Any, artists: Any) -> list[Any]:
    renderer = figure.canvas.get_renderer()
    return [artist.get_window_extent(renderer) for artist in artists]


def drawn(figure: Any) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    return figure


def shown_labels(axis: Any) -> list[Any]:
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label1 if tick.label1.get_visible() else tick.label2
        for tick in axis.get_major_ticks()
        if low <= tick.get_loc() <= high
    ]


@pytest.mark.parametrize(
    ("epochs", "tokens"),
    [
        ((0.001, 0.01, 0.02), 1e7),
        ((1e-4, 0.0013), 9e9),
        ((0.048, 0.5, 0.95), 5120),
        ((0.33,), 5120),
        ((0.1, 1.2), 999),
        ((0.05, 2.4), 1e5),
        ((0.05, 12.0), 5120),
        ((1.0, 300.0), 1e12),
    ],
)
def test_labels_of_the_loss_figure_do_not_overlap(epochs: Any, tokens: float) -> None:
    rows = [
        {"seen_epochs": e, "tokens_seen": e * tokens, "train_loss": 5 - i, "val_loss": 6 - i}
        for i, e in enumerate(epochs)
    ]
    figure = drawn(loss_figure(rows))
    for axes in figure.axes:
        labels = boxes(figure, shown_labels(axes.xaxis))
        assert 2 <= len(labels) <= 8
        assert not any(a.overlaps(b) for a, b in combinations(labels, 2))
        assert axes.get_xlim()[0] == 0
    colors = [line.get_color() for line in figure.axes[0].lines]
    assert colors == list(palette.SERIES[:2])


def gray(color: str) -> float:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_palette_colors_differ_in_gray_and_on_paper() -> None:
    first, second, *_ = palette.SERIES
    assert abs(gray(first) - gray(second)) > 0.25
    assert all(gray("#ffffff") - gray(color) > 0.25 for color in palette.SERIES)
    assert palette.ink_on(0, 0, 0) == palette.ink_on(0.2, 0.2, 0.3) == palette.PAPER
    assert palette.ink_on(1, 1, 1) == palette.ink_on(0.9, 0.8, 0.1) == palette.INK


def test_sampling_figure_has_a_readable_panel_for_each_setting() -> None:
    settings = sweep.grid([1.0, 0.1, 5.0], [None], [None])
    rows, _ = sampling.frequencies(
        torch.tensor(sampling.BOOK_LOGITS), sampling.BOOK_TOKENS, settings, 1000
    )
    figure = drawn(sampling.sampling_figure(rows, 1000, "the book's"))
    assert [axes.get_title() for axes in figure.axes] == [
        "temperature 1",
        "temperature 0.1",
        "temperature 5",
    ]
    for axes, per_setting in zip(figure.axes, (rows[:9], rows[9:18], rows[18:]), strict=True):
        bars = [patch for patch in axes.patches if patch.get_height() >= 0]
        assert [bar.get_height() for bar in bars] == [row.probability for row in per_setting]
        assert {to_hex(bar.get_facecolor()) for bar in bars} == {palette.SERIES[0]}
        names = boxes(figure, axes.texts)  # labels distinguish a small number from 0
        assert not any(a.overlaps(b) for a, b in combinations(names, 2))
    assert "4.3 %" in [text.get_text() for text in figure.axes[2].texts]


def measured(source: str, **values: Any) -> comparison_results.ModelMeasurement:
    known = {"train_loss": 2.08, "val_loss": 5.4, "seconds_to_first_token": 1.0204,
             "tokens_per_second": 13523.2, "peak_memory_bytes": 6_230_000_000}  # fmt: skip
    return comparison_results.ModelMeasurement(
        source, 164_000_000, 13_700_000, **{**known, **values}
    )


def test_sizes_figure_has_plain_numbers_and_nothing_covers_its_bars() -> None:
    models = [
        measured("checkpoints/a/best.ckpt"),
        measured("checkpoints/b/best.ckpt", tokens_per_second=None),
    ]
    figure = drawn(comparison_results.comparison_figure(models, "two"))
    texts = [text.get_text() for text in figure.findobj(match=lambda a: hasattr(a, "get_text"))]
    assert {"1,020", "13,523", "6.23", "0.164", "–"} <= set(texts)
    assert not any(re.search(r"e[+-]\d", text) for text in texts)
    assert {"a/best.ckpt", "b/best.ckpt"} <= set(texts)
    for axes in figure.axes:
        if (legend := axes.get_legend()) is not None:
            (box,) = boxes(figure, [legend])
            assert not any(box.overlaps(bar) for bar in boxes(figure, [*axes.patches, *axes.texts]))
        assert not any(a.overlaps(b) for a, b in combinations(boxes(figure, axes.texts), 2))
    drawn(
        comparison_results.comparison_figure(
            [measured("a", train_loss=None, val_loss=None)], "without a text"
        )
    )


def test_heat_maps_are_readable() -> None:
    cells = [
        sweep.GridCell(t, k, p, 0.5, 0.1 * i, 0.2, -1.0 - i, 1.0, share, share == 1, ["a", "b", "c", "d"])
        for p in (None, 0.9)
        for i, (t, k, share) in enumerate([(0.0, 1, 1.0), (0.0, None, 0.5), (1.5, 1, 0.25), (1.5, None, 0.25)])
    ]  # fmt: skip
    figure = drawn(sweep.heat_maps(cells, "caption"))
    assert len(figure.axes) == 2 * len(sweep.HEAT_MAP_METRICS)
    maps = [axes for axes in figure.axes if axes.get_title() == "identical texts"]
    assert [text.get_text() for text in maps[0].texts] == ["all 4", "2 of 4", "none", "none"]
    for axes in figure.axes:
        assert axes.title.get_fontsize() >= 12
        colors = axes.images[0].to_rgba(axes.images[0].get_array())[..., :3].reshape(-1, 3)
        assert [text.get_color() for text in axes.texts] == [palette.ink_on(*c) for c in colors]


def test_a_long_caption_stays_in_the_figure() -> None:
    caption = "from " + "/a-long-folder" * 30 + ", seed 123, prompt 'Every effort'"
    settings = sweep.grid([1.0], [None], [None])
    rows, _ = sampling.frequencies(torch.tensor([1.0, 2.0]), ["a", "b"], settings, 10)
    figures = [
        sampling.sampling_figure(rows, 10, caption),
        comparison_results.comparison_figure([measured("a")], caption),
    ]
    for figure in map(drawn, figures):
        (box,) = boxes(figure, [figure._supxlabel])
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_figures_escape_what_their_font_cannot_draw() -> None:
    assert plotting.escape_undrawable("tök 'α'\n🦜") == "tök 'α'\\n\\U0001f99c"
