"""``report sampling``, ``report sweep`` and the options of ``generate``, as commands."""

import csv
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL, Command, reference
from matplotlib.colors import to_hex

from gpt_lightning import palette
from gpt_lightning.cli.console import print_table
from gpt_lightning.cli.main import main
from gpt_lightning.reports import model_comparison, plotting, sampling, sweep
from gpt_lightning.training.run_files import loss_figure


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("trained")
    arguments = [f"--config={ROOT}/configs/quickstart.yaml", *SMALL, "--trainer.max_steps=4"]
    assert main(["fit", *arguments, f"--trainer.default_root_dir={folder}"]) == 0
    return str(folder / "checkpoints" / "quickstart")


def answer(done: Any) -> Any:
    assert done.code == 0, done.err
    return json.loads(done.out)


BOOK_COUNTS = {
    1.0: [73, 0, 0, 582, 2, 0, 0, 343, 0],
    0.1: [0, 0, 0, 985, 0, 0, 0, 15, 0],
    5.0: [165, 75, 42, 239, 71, 46, 32, 227, 103],
}


def test_exercise_5_1_gives_the_books_counts(command: Command) -> None:
    rows = answer(command("report", "sampling", "--json"))["rows"]
    for temperature, counts in BOOK_COUNTS.items():
        at_temperature = [row for row in rows if row["temperature"] == temperature]
        assert [row["count"] for row in at_temperature] == counts
        assert sum(row["probability"] for row in at_temperature) == pytest.approx(1.0)
        for row in at_temperature:
            assert row["expected"] == pytest.approx(1000 * row["probability"])
            assert row["low"] <= row["high"]
    recorded = reference("verdict_run.json")["exercise_5_1"]
    assert {f"{t:g}": counts for t, counts in BOOK_COUNTS.items()} == recorded["counts"]


def test_pizza_has_the_books_probability(command: Command) -> None:
    done = command("report", "sampling", "--token=pizza", "--json")
    pizza = {row["temperature"]: row for row in answer(done)["token"]}
    assert pizza[5.0]["probability"] == pytest.approx(0.043, abs=5e-5)
    done = command("report", "sampling", "--token=pizza")
    assert "pizza at temperature 5: 4.30% exactly, 32 of 1000 samples" in done.out
    methods = {m["name"]: m for m in answer(command("report", "sampling", "--json"))["methods"]}
    assert methods["exact"]["largest_error"] == 0.0
    assert methods["the book's loop"]["largest_error"] == pytest.approx(
        methods["all draws at once"]["largest_error"]
    )


def test_given_tokens_and_logits_are_sampled(command: Command) -> None:
    done = command(
        "report", "sampling", "--tokens=[a,b,c]", "--logits=[1,2,-1]", "--temperatures=[2,0]",
        "--num_samples=50", "--seed=7", "--top_k=[2]", "--json",
    )  # fmt: skip
    rows = answer(done)["rows"]
    assert [row["token"] for row in rows] == ["a", "b", "c"] * 2
    assert rows[2]["probability"] == 0.0  # top_k 2
    assert rows[4]["count"] == 50  # temperature 0
    assert rows[4]["z"] == 0.0


def test_next_tokens_of_a_model_are_sampled(command: Command, run: str, tmp_path: Path) -> None:
    done = command(
        "report", "sampling", f"--from={run}", "--prompt=The clock", "--show=6",
        "--temperatures=[0.5,1]", "--top_p=[0.9]", "--out=figures", "--json",
    )  # fmt: skip
    result = answer(done)
    assert len(result["rows"]) == 12
    assert result["rows"][0]["probability"] >= result["rows"][1]["probability"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "sampling.csv", "sampling.json", "sampling.png",
    }  # fmt: skip
    with (tmp_path / "figures" / "sampling.csv").open(encoding="utf-8") as file:
        assert [row["token"] for row in csv.DictReader(file)] == [
            r["token"] for r in result["rows"]
        ]


def test_sweep_writes_metrics_and_an_offline_page(
    command: Command, run: str, tmp_path: Path
) -> None:
    done = command(
        "report", "sweep", f"--from={run}", "--prompt=The clock", "--temperatures=[0,1]",
        "--top_k=[1,5,0]", "--num_samples=3", "--max_new_tokens=20", "--out=grid", "--json",
    )  # fmt: skip
    cells = answer(done)["cells"]
    assert [(c["temperature"], c["top_k"]) for c in cells] == [
        (0.0, 1), (0.0, 5), (0.0, None), (1.0, 1), (1.0, 5), (1.0, None),
    ]  # fmt: skip
    assert [c["deterministic"] for c in cells] == [True, True, True, True, False, False]
    assert [c["identical_share"] for c in cells[:4]] == [1.0] * 4
    assert len({text for c in cells[:4] for text in c["texts"]}) == 1
    for c in cells:
        assert c["mean_log_probability"] < 0
        assert 0 <= c["distinct_1"] <= 1
    assert cells[0]["next_token_entropy"] == pytest.approx(0.0, abs=1e-6)
    assert cells[5]["next_token_entropy"] > cells[4]["next_token_entropy"] > 0
    page = (tmp_path / "grid" / "sweep.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=(?!['\"]?data:)|https?://|@import|url\(", page)
    assert page.count("<td>") == 6
    names = {path.name for path in (tmp_path / "grid").iterdir()}
    assert names == {"sweep.png", "sweep.html", "sweep.json", "sweep.csv"}
    assert "deterministic: 1 of 2" in command(
        "report", "sweep", f"--from={run}", "--prompt=x", "--temperatures=[0,9]", "--top_k=[0]",
        "--num_samples=2", "--max_new_tokens=5",
    ).out  # fmt: skip


def test_sweep_page_explains_its_metrics_and_shows_each_text_once(
    command: Command, run: str, tmp_path: Path
) -> None:
    """The greedy text occurs once, 'identical' counts texts, and the report has the result of exercise 5.3."""
    base = ("report", "sweep", f"--from={run}", "--prompt=The clock", "--temperatures=[0,1]",
            "--top_k=[1,0]", "--num_samples=4", "--max_new_tokens=12")  # fmt: skip
    result = answer(command(*base, "--out=grid", "--json"))
    loop = result["generate_simple"]
    assert (loop["settings"], loop["equal"]) == (3, 3)
    assert result["cells"][0]["texts"] == [loop["text"]] * 4
    greedy, sampled = result["cells"][0]["texts"][0], result["cells"][3]["texts"]
    page = (tmp_path / "grid" / "sweep.html").read_text(encoding="utf-8")
    assert page.count(html.escape(greedy)) == 1
    assert page.count("the same text as with temperature 0, top_k 1") == 2
    assert all(html.escape(text) in page for text in sampled)
    assert page.count("<dd>all 4</dd>") == 3
    assert page.count("<dd>none</dd>") == 1
    for measure in (
        "distinct-1",
        "distinct-2",
        "repetition",
        "log-probability",
        "next-token entropy",
    ):
        assert page.count(f"<dt>{measure}</dt>") == 5  # in each cell, and in the legend
    comparison = (
        "generate_simple, the plain greedy loop, gives the same text as all 3 greedy settings"
    )
    assert comparison in page
    assert comparison in command(*base).out
    none = command(*base, "--temperatures=[1]", "--top_k=[5]")
    assert "no setting is greedy" in none.out


def test_a_text_that_differs_from_the_plain_loop_is_reported() -> None:
    assert str(sweep.PlainLoopComparison("", 4, 4)).startswith(
        "gives the same text as all 4 greedy settings"
    )
    assert str(sweep.PlainLoopComparison("", 4, 3)).startswith(
        "gives another text than 1 of 4 greedy"
    )


def on_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich treat the output as a terminal
    monkeypatch.setenv("COLUMNS", str(width))


@pytest.mark.parametrize("width", [60, 80])
def test_sweep_texts_are_below_the_table_at_any_width(
    command: Command, run: str, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    on_terminal(monkeypatch, width)
    done = command("report", "sweep", f"--from={run}", "--prompt=The clock", "--temperatures=[0,1]",
                   "--top_k=[1,5,0]", "--num_samples=2", "--max_new_tokens=9", "--top_p=[0.9,1]")  # fmt: skip
    assert done.code == 0, done.err
    out = re.sub(r"\x1b\[[0-9;]*m", "", done.out)
    table, _, texts = out.partition("\none text of each setting")
    if width > 60:  # 60 is narrower than the shortest words
        for name in ("temperature", "top_k", "top_p", "repetition", "entropy", "identical"):
            assert name in table
        assert max(map(len, table.splitlines()[1:])) <= width
    names = "temperature 0: top_k 1, 5, all with top_p 0.9, 1.0; temperature 1: top_k 1 with"
    assert names in " ".join(texts.split())
    assert texts.count("The clock") >= 2


@pytest.mark.parametrize("width", [80, 160])
def test_tables_are_never_cut_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    on_terminal(monkeypatch, width)
    row = {
        "model": "checkpoints/a-run/best.ckpt",
        **{f"measure {i}": f"{i}{i}.{i} GB" for i in range(12)},
    }
    print_table("sizes", [row, {**row, "model": "checkpoints/other/best.ckpt"}])
    out = capsys.readouterr().out
    for value in row.values():
        assert out.count(value) == (1 if value == row["model"] else 2)
    assert "…" not in out


def test_control_characters_are_escaped_on_a_terminal(
    command: Command, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In texts, tables and messages. A pipe gets the text unchanged, and newlines and tabs stay."""
    prompt = "The\tclock\n\x1b]0;owned\x07\x1b[31m\x9b1m"
    base = ("generate", f"--from={run}", f"--prompt={prompt}", "--max_new_tokens=1")
    assert command(*base).out.startswith(prompt)
    folder = tmp_path / "a\x1b[31m.txt"
    folder.mkdir()
    (folder / ".hidden.txt").write_text("x")
    (folder / "b.txt").write_text("y" * 9)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    escaped = "The\tclock\n\\x1b]0;owned\\x07\\x1b[31m\\x9b1m"
    for more in (["--stream=true"], ["--stream=false"], ["--num_samples=2"]):
        out = command(*base, *more).out
        assert escaped in out
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out)
    sweep_arguments = ("report", "sweep", f"--from={run}", "--temperatures=[1]", "--top_k=[5]", "--num_samples=2",
               "--max_new_tokens=3")  # fmt: skip
    done = command(*sweep_arguments, f"--prompt={prompt}")
    assert "\\x1b[31m" in done.out
    assert "\x1b]" not in done.out
    done = command("prepare", str(folder), "--val_ratio=0", "--out=c\x1b[31m")
    assert done.code == 0
    assert "\x1b" not in done.out + done.err
    assert "left out: 1 hidden" in done.err


_PROGRESS = """
import logging
from gpt_lightning.cli.console import progress
from gpt_lightning.cli.logs import log_to_stderr
from gpt_lightning.cli.streams import standard_streams
with standard_streams(ignore_stdout_errors=False), log_to_stderr(logging.INFO):
    with progress("cells", 1) as advance:
        advance()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_bar_of_a_report_is_drawn_on_a_terminal() -> None:
    """Its control characters move the cursor, although those of messages are escaped."""
    terminal, end = os.openpty()
    subprocess.run([sys.executable, "-c", _PROGRESS], stderr=end, check=True)
    os.close(end)
    drawn_bytes = os.read(terminal, 1 << 16)
    os.close(terminal)
    assert b"cells" in drawn_bytes
    assert b"\x1b[" in drawn_bytes
    assert b"\\x1b" not in drawn_bytes


def test_samples_during_training_are_escaped_on_a_terminal(
    fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "--evaluation.prompt=The \x1b[31mclock"
    arguments = (prompt, "--trainer.max_steps=1", "--trainer.limit_train_batches=1")
    assert "The \x1b[31mclock" in fit(*arguments, "--run=pipe").out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    out = fit(*arguments, "--run=terminal").out
    assert "The \\x1b[31mclock" in out
    assert "\x1b" not in out


# --- figures --------------------------------------------------------------------------------------


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


def measured(source: str, **figures: Any) -> model_comparison.ModelMeasurement:
    known = {"train_loss": 2.08, "val_loss": 5.4, "seconds_to_first_token": 1.0204,
             "tokens_per_second": 13523.2, "peak_memory_bytes": 6_230_000_000}  # fmt: skip
    return model_comparison.ModelMeasurement(
        source, 164_000_000, 13_700_000, **{**known, **figures}
    )


def test_sizes_figure_has_plain_numbers_and_nothing_covers_its_bars() -> None:
    models = [
        measured("checkpoints/a/best.ckpt"),
        measured("checkpoints/b/best.ckpt", tokens_per_second=None),
    ]
    figure = drawn(model_comparison.comparison_figure(models, "two"))
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
        model_comparison.comparison_figure(
            [measured("a", train_loss=None, val_loss=None)], "without a text"
        )
    )


def test_time_to_first_token_excludes_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process's first pass takes a second, which must not be added to the first model only."""
    times = iter([[1.02, 0.5], [0.4], *[[0.008]] * 200, [0.008, 0.01, 0.3, 0.01]])
    monkeypatch.setattr(
        model_comparison, "_token_times", lambda model, task, new_tokens: next(times)
    )
    monkeypatch.setattr(model_comparison, "_MIN_FIRST_TOKEN_SECONDS", 0.4 + 199.5 * 0.008)
    task = model_comparison.ComparisonTask("x", model_comparison.SamplingParams(), 1, 4, 1)
    first_token, rate = model_comparison._speed(None, task)  # type: ignore[arg-type]
    assert first_token == 0.008
    assert rate == pytest.approx(100)


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
        model_comparison.comparison_figure([measured("a")], caption),
    ]
    for figure in map(drawn, figures):
        (box,) = boxes(figure, [figure._supxlabel])
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_figures_escape_what_their_font_cannot_draw() -> None:
    assert plotting.escape_undrawable("tök 'α'\n🦜") == "tök 'α'\\n\\U0001f99c"


def test_prompts_are_not_parsed_as_markup(command: Command, run: str) -> None:
    prompt = "[/b] costs $x^^$ :smile:"
    base = ("report", "sweep", f"--from={run}", f"--prompt={prompt}", "--temperatures=[1]",
            "--top_k=[5]", "--num_samples=2", "--max_new_tokens=3", "--out=grid")  # fmt: skip
    assert prompt in command(*base).out
    done = command("report", "sampling", f"--from={run}", f"--prompt={prompt}", "--out=grid")
    assert (done.code, prompt in done.out) == (0, True)


def test_token_option_adds_a_row_of_the_model(command: Command, run: str) -> None:
    done = command(
        "report", "sampling", f"--from={run}", "--prompt=The clock", "--token= pizza",
        "--show=2", "--temperatures=[1]", "--json",
    )  # fmt: skip
    result = answer(done)
    assert [row["token"] for row in result["token"]] == ["' pizza'"]
    assert len(result["rows"]) == 3


def test_sweep_page_loads_nothing_in_a_browser(command: Command, run: str, tmp_path: Path) -> None:
    """The page shows the grid and requests no resource. (The browser itself may call its maker.)"""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium here")
    command(
        "report", "sweep", f"--from={run}", "--prompt=The clock", "--temperatures=[0,1]",
        "--top_k=[1,0]", "--num_samples=2", "--max_new_tokens=5", "--out=grid",
    )  # fmt: skip
    page = tmp_path / "grid" / "sweep.html"
    count_requests = (
        "<script>addEventListener('load', () => { document.title = 'requested ' + performance"
        ".getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length })</script>"
    )
    page.write_text(page.read_text(encoding="utf-8") + count_requests, encoding="utf-8")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path}/profile", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "<title>requested 0</title>" in done.stdout
    assert done.stdout.count("<td>") == 4


def test_prompts_come_from_options_file_and_standard_input(
    command: Command, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ("generate", f"--from={run}", "--max_new_tokens=6", "--json")
    single = answer(command(*base, "--prompt=The clock"))
    assert [s["text"] for s in single["samples"]] == [single["text"]]
    both = answer(command(*base, "--prompt=The clock", "--prompt=Mr. Vane, he said"))
    assert [s["prompt"] for s in both["samples"]] == ["The clock", "Mr. Vane, he said"]
    assert both["samples"][0] == single["samples"][0]
    (tmp_path / "prompt.txt").write_text("The clock\n", encoding="utf-8")
    assert answer(command(*base, "--prompt_file=prompt.txt"))["text"] == single["text"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("The clock\n"))
    assert answer(command(*base))["text"] == single["text"]


@pytest.mark.parametrize(
    ("config", "arguments", "prompts"),
    [
        ("prompt: Hello", ["CONFIG"], ["Hello"]),
        ("prompt: [a, b]", ["CONFIG"], ["a", "b"]),
        ("prompt: [a, b]", ["CONFIG", "--prompt=x"], ["x"]),
        ("prompt: [a, b]", ["--prompt=x", "CONFIG", "--prompt=y"], ["x", "y"]),
        ("prompt: Hello", ["--prompt=[y]", "CONFIG"], ["[y]"]),
        ("prompt: null", ["--prompt=null", "CONFIG"], ["null"]),
        ("prompt_file: p.txt", ["--prompt=x", "CONFIG"], ["x"]),
        ("prompt: Hello", ["CONFIG", "--prompt_file=p.txt"], ["from a file"]),
        ("prompt: x\nstop: [END]", ["CONFIG"], ["x"]),
        ("prompt: x\nstop: END", ["CONFIG", "--stop", "A B"], ["x"]),
        ("prompt: x\nnum_samples: 3", ["--num_samples=1", "CONFIG"], ["x"]),
        ("\ufeffprompt: x", ["CONFIG"], ["x"]),
    ],
)
def test_texts_of_the_command_line_have_priority_over_a_config(
    command: Command,
    run: str,
    tmp_path: Path,
    config: str,
    arguments: list[str],
    prompts: list[str],
) -> None:
    """A config may hold a text or a list; the command line has priority wherever --config is."""
    (tmp_path / "mine.yaml").write_text(config, encoding="utf-8")
    (tmp_path / "p.txt").write_text("from a file", encoding="utf-8")
    options = ["--config=mine.yaml" if each == "CONFIG" else each for each in arguments]
    done = answer(command("generate", f"--from={run}", "--max_new_tokens=0", "--json", *options))
    assert [sample["prompt"] for sample in done["samples"]] == prompts
    stop = {"stop: [END]": ["END"], "stop: END": ["A B"]}.get(config.partition("\n")[2])
    assert done["settings"]["stop"] == stop


def test_sources_of_the_command_line_have_priority_over_a_config(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("from: nowhere\nprompt: x\n", encoding="utf-8")
    done = command("report", "sizes", "--config=mine.yaml")
    assert done.err.startswith("gpt_lightning: error: nowhere: ")
    done = command("report", "sizes", "--from", "elsewhere", "--config=mine.yaml")
    assert done.err.startswith("gpt_lightning: error: elsewhere: ")


@pytest.mark.parametrize(
    ("content", "label"),
    [
        (b"\xef\xbb\xbfThe clock\n", "BOM"),
        (b"The clock\r\n", "CRLF"),
        (b"The clock\r", "CR"),
        (b"\xef\xbb\xbfThe clock\r\n", "both"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_prompt_is_the_same_from_every_origin(
    command: Command,
    run: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    label: str,
) -> None:
    base = ("generate", f"--from={run}", "--max_new_tokens=0", "--json")
    (tmp_path / "p.txt").write_bytes(content)
    assert answer(command(*base, "--prompt_file=p.txt"))["prompt"] == "The clock"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    assert answer(command(*base))["prompt"] == "The clock"
    monkeypatch.setattr(sys, "stdin", io.StringIO(content.decode(), newline=""))
    assert answer(command(*base))["prompt"] == "The clock"
    given = content.decode().rstrip("\r\n")
    assert answer(command(*base, f"--prompt={given}"))["prompt"] == "The clock"


def test_byte_order_mark_in_a_models_config_is_ignored(
    command: Command, run: str, tmp_path: Path
) -> None:
    assert command("convert", run, "model", "--format=hf").code == 0
    (tmp_path / "model" / "manifest.json").unlink()
    config = tmp_path / "model" / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    base = ("generate", "--prompt=The clock", "--max_new_tokens=3", "--json")
    assert (
        answer(command(*base, "--from=model"))["text"]
        == answer(command(*base, f"--from={run}"))["text"]
    )


def test_tilde_in_paths_is_the_home_folder(
    command: Command, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "p.txt").write_text("The clock", encoding="utf-8")
    (home / "mine.yaml").write_text("max_new_tokens: 0", encoding="utf-8")
    base = ("generate", f"--from={run}", "--json", "--config=~/mine.yaml")
    assert answer(command(*base, "--prompt_file=~/p.txt"))["text"] == "The clock"
    answer(command("report", "sampling", "--out=~/figures", "--json"))
    assert (home / "figures" / "sampling.png").exists()
    assert not (tmp_path / "~").exists()


def test_num_samples_differ_and_streaming_prints_the_same_text(command: Command, run: str) -> None:
    base = ("generate", f"--from={run}", "--prompt=The clock", "--max_new_tokens=8")
    many = answer(command(*base, "--temperature=1", "--num_samples=3", "--json"))
    assert len({s["text"] for s in many["samples"]}) == 3
    at_once, streamed = command(*base), command(*base, "--stream=true")
    assert streamed.out == at_once.out
    assert command(*base, "--num_samples=2").out.count("---") == 2


def test_stop_string_ends_the_text(command: Command, run: str) -> None:
    base = ("generate", f"--from={run}", "--prompt=The clock", "--max_new_tokens=30",
            "--temperature=1", "--eos_id=null")  # fmt: skip
    text = command(*base).out.rstrip("\n")
    stop = text[len("The clock") + 12 : len("The clock") + 20]
    expected = text[: text.index(stop, len("The clock"))]
    for stream in ("false", "true"):
        assert command(*base, f"--stop={stop}", f"--stream={stream}").out.rstrip("\n") == expected


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["report", "sampling", "--tokens=[a,b]"], ["logits: 9 for 2 tokens"]),
        (["report", "sampling", "--tokens=[a,b]", "--logits=[1,2,3]"], ["logits: 3 for 2 tokens"]),
        (["report", "sampling", "--logits=[.nan,1]"], ["logits"]),
        (["report", "sampling", "--logits=[-.inf,-.inf]"], ["logits"]),
        (["report", "sampling", "--temperatures=[-1]"], ["temperature: -1"]),
        (["report", "sampling", "--top_p=[0]"], ["top_p: 0.0 is outside (0, 1]"]),
        (["report", "sampling", "--top_k=[10]"], ["top_k: 10 is outside the vocabulary"]),
        (["report", "sampling", "--num_samples=0"], ["num_samples: 0"]),
        (["report", "sampling", "--token=pasta"], ["token: pasta", "pizza"]),
        (["report", "sampling", "--prompt=x"], ["prompt: needs a model"]),
        (["report", "sampling", "--temperatures=[]"], ["temperatures: is an empty list"]),
        (["report", "sampling", "--tokens=[]"], ["logits: 9 for 0 tokens"]),
        (["report", "sampling", "--from=RUN", "--prompt=x", "--show=0"], ["show: 0"]),
        (["report", "sampling", "--from=RUN", "--prompt=x", "--token=a b"], ["is 2 tokens"]),
        (["report", "sweep", "--from=RUN", "--prompt=x", "--top_k=[]"], ["top_k: is an empty"]),
        (["generate", "--from=RUN", "--prompt=x", "--stream=true", "--json"], ["stream: is for"]),
        (["generate", "--from=RUN", "--prompt=x", "--device=meta"], ["device: meta"]),
        (
            ["generate", "--from=RUN", "--prompt=x", "--repetition_penalty=1e-45"],
            ["repetition_penalty: 1e-45"],
        ),
        (["report", "sampling", "--out=/proc/nowhere"], ["out: /proc/nowhere cannot be written"]),
        (["report", "sampling", "--from=RUN"], ["prompt: is empty"]),
        (["report", "sweep", "--prompt=x"], ["--from SOURCE"]),
        (["report", "sweep", "--from=RUN"], ["prompt: is empty"]),
        (["report", "sweep", "--from=RUN", "--prompt=x", "--num_samples=1"], ["num_samples: 1"]),
        (["report", "swep"], ["did you mean sweep?"]),
        (["generate", "--from=RUN", "--prompt=x", "--top_p=1.5"], ["top_p: 1.5 is outside (0, 1]"]),
        (["generate", "--from=RUN", "--prompt=x", "--min_p=0"], ["min_p: 0.0 is outside (0, 1]"]),
        (["generate", "--from=RUN", "--prompt=x", "--stop="], ["stop: is empty"]),
        (["generate", "--from=RUN", "--prompt=x", "--num_samples=0"], ["num_samples: 0"]),
        (["generate", "--from=RUN", "--prompt_file=nowhere"], ["nowhere: No such file"]),
        (["generate", "--from=RUN", "--prompt_file=latin"], ["prompt_file: latin is not UTF-8"]),
        (
            ["generate", "--from=RUN", "--prompt_file=utf-16"],
            ["prompt_file: utf-16 is UTF-16, not"],
        ),
        (["generate", "--from=RUN", "--config=utf-16"], ["config: utf-16 is UTF-16, not UTF-8"]),
        (["generate", "--from=RUN", "--config=latin"], ["config: latin is not UTF-8 (byte 0"]),
        (
            ["generate", "--from=RUN", "--config=number.yaml"],
            ["prompt: 3 is not text; put it in quotes"],
        ),
        (
            ["generate", "--from=RUN", "--prompt=caf\udce9"],
            ["prompt: is not valid UTF-8 (byte 0xe9 at character 3)"],
        ),
        (
            ["generate", "--from=RUN", "--prompt=x", "--stop=\ud800"],
            ["stop: is not valid UTF-8 (\\ud800"],
        ),
        (
            ["report", "sweep", "--from=RUN", "--prompt=caf\udce9"],
            ["prompt: is not valid UTF-8 (byte 0xe9"],
        ),
        (
            ["report", "sizes", "--from=RUN", "--prompt=\udc00"],
            ["prompt: is not valid UTF-8 (\\udc00"],
        ),
        (["report", "sampling", "--token=caf\udce9"], ["token: is not valid UTF-8 (byte 0xe9"]),
        (
            ["report", "sampling", "--tokens=[caf\udce9]", "--logits=[1]"],
            ["tokens: is not valid UTF-8"],
        ),
        (
            ["fit", f"--config={ROOT}/configs/quickstart.yaml", "--evaluation.prompt=caf\udce9"],
            ["evaluation.prompt: is not valid UTF-8 (byte 0xe9"],
        ),
        (["generate", "--from=RUN", "--prompt=x", "--prompt_file=latin"], ["give one of them"]),
    ],
    ids=lambda value: " ".join(value[:4]),
)
def test_bad_input_is_refused_in_one_line(
    command: Command, run: str, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    (tmp_path / "latin").write_bytes("Übermut".encode("latin-1"))
    (tmp_path / "utf-16").write_bytes("Übermut".encode("utf-16"))
    (tmp_path / "number.yaml").write_bytes(b"prompt: 3")
    done = command(*[argument.replace("RUN", run) for argument in arguments])
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("gpt_lightning: error: ")
    assert done.err.count("\n") == 1
    for part in parts:
        assert part in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"latin", "utf-16", "number.yaml"}
