"""README's quick start has the blocks that .ci/run executes; the tree and the book's numbers in the docs are right."""

import re

from helpers import ROOT, reference

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"


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
