"""README's commands parse, the tree of the docs is the tree, links into the code exist."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, Command, reference

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(DOCS.rglob("*.md")),
]
COMMANDS = sorted(
    set(re.findall(r"^python -m gpt_lightning (.+)$", README, re.M))
    | set(
        re.findall(
            r"`((?:fit|validate|generate|report \w+) --(?:config|from|token) [^`]+)`", README
        )
    )
)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(
    command: Command, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (words := shlex.split(line)).append("--print_config")
    from gpt_lightning.cli.main import main

    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    assert ":" in capsys.readouterr().out


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 7


def test_tree_is_the_tree() -> None:
    page = (DOCS / "design" / "architecture.md").read_text(encoding="utf-8")
    tree = page.split("## The tree")[1].split("```")[1]
    named, folders = set(), [""] * 9
    for indent, name in re.findall(r"^( *)(\S+)", tree, re.M):
        depth = len(indent) // 2
        folders[depth] = name
        if name.endswith((".py", ".txt")):
            named.add("".join(folders[1:depth]) + name)
    package = ROOT / "gpt_lightning"
    there = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.suffix in (".py", ".txt") and path.name not in ("__main__.py", "__init__.py")
    }
    assert named == there


def test_quickstart_has_one_block_that_runs_and_one_that_tests() -> None:
    section = README.split("## Quickstart")[1].split("\n## ")[0]
    run, test = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", section, re.M | re.S)
    assert "fit --config configs/quickstart.yaml" in run
    assert "pytest" in test


def test_table_of_digits_is_the_books() -> None:
    page = (DOCS / "book-run.md").read_text(encoding="utf-8")
    table = page.split("## Losses")[1].split("\n## ")[0]
    cells = re.findall(r"(\d+) \| (\d+) \| (\S+) / (\S+) \| (\S+) / (\S+)", table)
    expected = [
        (str(e), str(s), f"{t:.3f}", f"{v:.3f}")
        for e, s, t, v in reference("verdict_run.json")["rows"]
    ]
    assert sorted(expected, key=lambda row: int(row[1])) == sorted(
        (row[:4] for row in cells), key=lambda row: int(row[1])
    )
    assert all(row[2:4] == row[4:6] for row in cells)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+\.py)`", text):
        folders = ("", "gpt_lightning", "tests", "benchmarks", "docs")
        assert any((ROOT / folder / name).is_file() for folder in folders), name
