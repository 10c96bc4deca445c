"""``report sweep``: its metrics and its page."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gpt_lightning.reports import sweep
from helpers import (
    Command,
    json_of,
)


def test_sweep_writes_metrics_and_an_offline_page(
    command: Command, trained_run: Path, tmp_path: Path
) -> None:
    result = command(
        "report", "sweep", f"--from={trained_run}", "--prompt=The clock", "--temperatures=[0,1]",
        "--top_k=[1,5,0]", "--num_samples=3", "--max_new_tokens=20", "--out=grid", "--json",
    )  # fmt: skip
    cells = json_of(result)["cells"]
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
        "report", "sweep", f"--from={trained_run}", "--prompt=x", "--temperatures=[0,9]", "--top_k=[0]",
        "--num_samples=2", "--max_new_tokens=5",
    ).out  # fmt: skip


def test_sweep_page_explains_its_metrics_and_shows_each_text_once(
    command: Command, trained_run: Path, tmp_path: Path
) -> None:
    """The greedy text occurs once, 'identical' counts texts, and the report has the result of exercise 5.3."""
    base = ("report", "sweep", f"--from={trained_run}", "--prompt=The clock", "--temperatures=[0,1]",
            "--top_k=[1,0]", "--num_samples=4", "--max_new_tokens=12")  # fmt: skip
    result = json_of(command(*base, "--out=grid", "--json"))
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


def test_sweep_page_loads_nothing_in_a_browser(
    command: Command, trained_run: Path, tmp_path: Path
) -> None:
    """The page shows the grid and requests no resource. (The browser itself may call its maker.)"""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium here")
    command(
        "report", "sweep", f"--from={trained_run}", "--prompt=The clock", "--temperatures=[0,1]",
        "--top_k=[1,0]", "--num_samples=2", "--max_new_tokens=5", "--out=grid",
    )  # fmt: skip
    page = tmp_path / "grid" / "sweep.html"
    count_requests = (
        "<script>addEventListener('load', () => { document.title = 'requested ' + performance"
        ".getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length })</script>"
    )
    page.write_text(page.read_text(encoding="utf-8") + count_requests, encoding="utf-8")
    result = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path}/profile", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "<title>requested 0</title>" in result.stdout
    assert result.stdout.count("<td>") == 4
