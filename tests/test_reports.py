"""``report sampling``, ``report sweep`` and the options of ``generate``, as commands."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL, Command, reference

from gpt_lightning.cli import main


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


def test_exercise_5_1(command: Command) -> None:
    rows = answer(command("report", "sampling", "--json"))["rows"]
    for temperature, counts in BOOK_COUNTS.items():
        own = [row for row in rows if row["temperature"] == temperature]
        assert [row["count"] for row in own] == counts
        assert sum(row["probability"] for row in own) == pytest.approx(1.0)
        for row in own:
            assert row["expected"] == pytest.approx(1000 * row["probability"])
            assert row["low"] <= row["high"]
    recorded = reference("verdict_run.json")["exercise_5_1"]
    assert {f"{t:g}": counts for t, counts in BOOK_COUNTS.items()} == recorded["counts"]


def test_pizza(command: Command) -> None:
    done = command("report", "sampling", "--token=pizza", "--json")
    pizza = {row["temperature"]: row for row in answer(done)["token"]}
    assert pizza[5.0]["probability"] == pytest.approx(0.043, abs=5e-5)
    done = command("report", "sampling", "--token=pizza")
    assert "pizza at temperature 5: 4.30% exactly, 32 of 1000 drawn" in done.out
    methods = {m["name"]: m for m in answer(command("report", "sampling", "--json"))["methods"]}
    assert methods["exact"]["largest_error"] == 0.0
    assert methods["the book's loop"]["largest_error"] == pytest.approx(
        methods["all draws at once"]["largest_error"]
    )


def test_own_distribution(command: Command) -> None:
    done = command(
        "report", "sampling", "--tokens=[a,b,c]", "--logits=[1,2,-1]", "--temperatures=[2,0]",
        "--num_samples=50", "--seed=7", "--top_k=[2]", "--json",
    )  # fmt: skip
    rows = answer(done)["rows"]
    assert [row["token"] for row in rows] == ["a", "b", "c"] * 2
    assert rows[2]["probability"] == 0.0  # top_k 2
    assert rows[4]["count"] == 50  # temperature 0
    assert rows[4]["z"] == 0.0


def test_distribution_of_a_model(command: Command, run: str, tmp_path: Path) -> None:
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


def test_sweep(command: Command, run: str, tmp_path: Path) -> None:
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


def test_prompts_are_no_markup(command: Command, run: str) -> None:
    prompt = "[/b] costs $x^^$ :smile:"
    base = ("report", "sweep", f"--from={run}", f"--prompt={prompt}", "--temperatures=[1]",
            "--top_k=[5]", "--num_samples=2", "--max_new_tokens=3", "--out=grid")  # fmt: skip
    assert prompt in command(*base).out
    done = command("report", "sampling", f"--from={run}", f"--prompt={prompt}", "--out=grid")
    assert (done.code, prompt in done.out) == (0, True)


def test_one_token_of_the_models(command: Command, run: str) -> None:
    done = command(
        "report", "sampling", f"--from={run}", "--prompt=The clock", "--token= pizza",
        "--show=2", "--temperatures=[1]", "--json",
    )  # fmt: skip
    result = answer(done)
    assert [row["token"] for row in result["token"]] == ["' pizza'"]
    assert len(result["rows"]) == 3


def test_page_in_a_browser(command: Command, run: str, tmp_path: Path) -> None:
    """The grid is there, and the page itself asked for nothing (the browser does, of its makers)."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium here")
    command(
        "report", "sweep", f"--from={run}", "--prompt=The clock", "--temperatures=[0,1]",
        "--top_k=[1,0]", "--num_samples=2", "--max_new_tokens=5", "--out=grid",
    )  # fmt: skip
    page = tmp_path / "grid" / "sweep.html"
    asks = (
        "<script>addEventListener('load', () => { document.title = 'asked for ' + performance"
        ".getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length })</script>"
    )
    page.write_text(page.read_text(encoding="utf-8") + asks, encoding="utf-8")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path}/profile", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "<title>asked for 0</title>" in done.stdout
    assert done.stdout.count("<td>") == 4


def test_prompts_from_everywhere(
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
def test_texts_of_a_config_and_of_the_command_line(
    command: Command,
    run: str,
    tmp_path: Path,
    config: str,
    arguments: list[str],
    prompts: list[str],
) -> None:
    """Text and list are both taken, and the command line wins wherever --config stands."""
    (tmp_path / "mine.yaml").write_text(config, encoding="utf-8")
    (tmp_path / "p.txt").write_text("from a file", encoding="utf-8")
    options = ["--config=mine.yaml" if each == "CONFIG" else each for each in arguments]
    done = answer(command("generate", f"--from={run}", "--max_new_tokens=0", "--json", *options))
    assert [sample["prompt"] for sample in done["samples"]] == prompts
    stop = {"stop: [END]": ["END"], "stop: END": ["A B"]}.get(config.partition("\n")[2])
    assert done["settings"]["stop"] == stop


def test_sources_of_a_config(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("from: nowhere\nprompt: x\n", encoding="utf-8")
    done = command("report", "sizes", "--config=mine.yaml")
    assert done.err.startswith("gpt_lightning: error: nowhere: ")
    done = command("report", "sizes", "--from", "elsewhere", "--config=mine.yaml")
    assert done.err.startswith("gpt_lightning: error: elsewhere: ")


@pytest.mark.parametrize(
    ("content", "how"),
    [
        (b"\xef\xbb\xbfThe clock\n", "BOM"),
        (b"The clock\r\n", "CRLF"),
        (b"The clock\r", "CR"),
        (b"\xef\xbb\xbfThe clock\r\n", "both"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_prompt_is_the_same_from_everywhere(
    command: Command,
    run: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    how: str,
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


def test_home_in_paths(
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


def test_num_samples_and_streaming(command: Command, run: str) -> None:
    base = ("generate", f"--from={run}", "--prompt=The clock", "--max_new_tokens=8")
    many = answer(command(*base, "--temperature=1", "--num_samples=3", "--json"))
    assert len({s["text"] for s in many["samples"]}) == 3
    whole, streamed = command(*base), command(*base, "--stream=true")
    assert streamed.out == whole.out
    assert command(*base, "--num_samples=2").out.count("---") == 2


def test_stop_strings(command: Command, run: str) -> None:
    base = ("generate", f"--from={run}", "--prompt=The clock", "--max_new_tokens=30",
            "--temperature=1", "--eos_id=null")  # fmt: skip
    free = command(*base).out.rstrip("\n")
    stop = free[len("The clock") + 12 : len("The clock") + 20]
    expected = free[: free.index(stop, len("The clock"))]
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
        (["report", "sampling", "--prompt=x"], ["prompt: is for a model"]),
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
def test_bad_input(
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
