"""docs/notebooks/chapter05.ipynb: what the repository has of it, and what it shows when it runs."""

import ast
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import torch

from helpers import ENVIRONMENT, ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "chapter05.ipynb"
API_PAGE = ROOT / "docs" / "python-api.md"


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_notebook_is_valid_and_has_no_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert (cell.outputs, cell.execution_count) == ([], None)


def test_notebook_has_all_exercises(notebook: Any) -> None:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## Exercise (\S+):", text, re.M)
    assert headings == ["5.1", "5.2", "5.3", "5.4", "5.5", "5.6"]


@pytest.mark.parametrize("page", ["README.md", "docs/exercises.md", "docs/python-api.md"])
def test_pages_link_to_the_notebook(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+\.ipynb)\)", text)
    assert [((ROOT / page).parent / target).resolve() for target in targets] == [NOTEBOOK]


def names_of_the_package(code: str) -> set[str]:
    """Names below ``gpt_lightning`` that the code imports, with the attributes of imported modules."""
    imported: dict[str, str] = {}
    found = set()
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gpt_lightning"):
            imported |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
        elif isinstance(node, ast.Import):
            found.update(a.name for a in node.names if a.name.startswith("gpt_lightning"))
    modules = {
        name for name, path in imported.items() if (ROOT / f"{path.replace('.', '/')}.py").exists()
    }
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in modules:
                found.add(f"{imported[name]}.{attribute}")
    return found | {path for name, path in imported.items() if name not in modules}


def public_names() -> set[str]:
    """Names on the page of the API, by the paths by which they are imported."""
    import gpt_lightning

    listed = re.findall(r"^::: (gpt_lightning\.reports\.\S+)$", API_PAGE.read_text("utf-8"), re.M)
    return {
        *listed,
        *(f"gpt_lightning.{name}" for name in gpt_lightning.__all__),
        "gpt_lightning.cli.main.main",
    }


def test_notebook_uses_public_names_only(notebook: Any) -> None:
    program = "\n".join(cell.source for cell in code_cells(notebook))
    used = names_of_the_package(re.sub(r"^( *)%.*", r"\1pass", program, flags=re.M))
    assert "gpt_lightning.reports.sampling.frequencies" in used
    assert used <= public_names()


@pytest.mark.parametrize("page", ["README.md", "docs/python-api.md", "docs/weights.md"])
def test_examples_of_the_pages_use_public_names_only(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert set().union(*map(names_of_the_package, examples)) <= public_names()


def test_first_cell_installs_in_colab_only_and_keeps_torch(
    notebook: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    shell = InteractiveShell(
        config=Config({"HistoryManager": {"enabled": False}}),
        user_module=ModuleType("chapter05"),  # else it replaces the tests' __main__
    )
    installed: list[str] = []
    shell.register_magic_function(installed.append, "line", "pip")
    first = code_cells(notebook)[0].source
    shell.run_cell(first).raise_error()
    assert installed == []
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    shell.run_cell(first).raise_error()
    assert installed == [f'install -q gpt-lightning "torch=={torch.__version__}"']


def outputs(notebook: Any, cell_id: str) -> list[Any]:
    (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
    return list(cell.outputs)


def shown(notebook: Any, cell_id: str, kind: str) -> str:
    """The last output of a cell in a format."""
    return str([o.data[kind] for o in outputs(notebook, cell_id) if kind in o.get("data", {})][-1])


def printed(notebook: Any, cell_id: str) -> str:
    return "".join(o.text for o in outputs(notebook, cell_id) if o.output_type == "stream")


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(notebook: Any, tmp_path: Path) -> None:
    """A clean kernel in an empty folder: every cell succeeds, and nothing stays outside the temporary folder."""
    from nbclient import NotebookClient

    home, work, temporary = (tmp_path / name for name in ("home", "work", "tmp"))
    for folder in (home, work, temporary):
        folder.mkdir()
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    )
    folders = {"HOME": home, "TMPDIR": temporary, "GPT_LIGHTNING_CACHE": tmp_path / "cache"}
    client.execute(
        env=ENVIRONMENT
        | {name: str(folder) for name, folder in folders.items()}
        # transformers, which only the tests install, warns of a missing ipywidgets
        | {"PYTHONWARNINGS": "ignore:IProgress not found"}
    )

    streams = [o for c in code_cells(notebook) for o in c.outputs if o.output_type == "stream"]
    assert [stream.text for stream in streams if stream.name == "stderr"] == []
    assert not any("\x1b" in stream.text for stream in streams)
    figures = [
        cell.id
        for cell in code_cells(notebook)
        if any("image/png" in output.get("data", {}) for output in cell.outputs)
    ]
    assert figures == [
        "loss-figure",
        "ex51-figure",
        "ex51-model-figure",
        "ex52-figure",
        "ex54-resume-fit",
        "ex56-fit",
        "ex56-figure",
    ]
    assert "eta" in outputs(notebook, "fit")[0].data["text/html"]  # the progress bar
    assert shown(notebook, "fit", "text/html").startswith("<table>")
    assert "<td>pizza</td><td>4.2998%</td>" in shown(notebook, "ex51-table", "text/html")
    assert shown(notebook, "ex52-sweep", "text/html").count("<td>all 8</td>") >= 7
    assert "gives the same text as all 7 greedy settings" in printed(notebook, "ex53-loop")
    losses = [float(x) for x in re.findall(r"Val loss (\S+)", printed(notebook, "fit"))]
    assert losses[0] > 10.5
    assert losses[-1] < 8
    one, other = printed(notebook, "ex55-hf").splitlines()[-1].split()[2:]
    assert one == other
    for cell in ("ex55-gpt2-validate", "ex56-gpt2-compare"):
        assert printed(notebook, cell).startswith("gpt2-124M: is not downloaded")

    assert os.listdir(work) == []
    (folder,) = temporary.glob("chapter05-*")
    assert {path.name for path in folder.iterdir()} == {"checkpoints", "exported"}
    assert not (tmp_path / "cache").exists()
    assert {path.name for path in home.iterdir()} <= {".ipython", ".cache", ".config"}  # not ours
