"""README and docs: commands parse, the pages that scripts write are up to date, sentences are short."""

import importlib.util
import re
import shlex
import sys
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import gpt_lightning
from gpt_lightning.cli.main import VERBS, main
from gpt_lightning.cli.report import REPORTS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(DOCS.rglob("*.md")),
]

MAX_README_BYTES = 9_000
MAX_WORDS_PER_SENTENCE = 20  # on average


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def script(name: str) -> ModuleType:
    """A script of docs/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands_of(page: Path) -> set[str]:
    """Arguments of each command: in blocks, also under torchrun, and in the text with a telling option."""
    text = text_of(page).replace("\\\n", " ")
    in_blocks = re.findall(r"^[^`\n]*?(?:python -m|-m --) gpt_lightning (.+)$", text, re.M)
    in_text = re.findall(
        r"`((?:fit|validate|generate|plan|verify-resume|report \w+) --(?:config|from|init_from|token) [^`]+)`",
        text,
    )
    in_text += re.findall(r"`python -m gpt_lightning ([a-z][^`]+)`", text)
    return {
        shlex.join(shlex.split(command.partition("`")[0], comments=True))
        for command in (*in_blocks, *in_text)
        if "…" not in command
    }


COMMANDS = sorted({command for page in PAGES for command in commands_of(page)})


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path))
    if line.startswith("configs "):  # has no settings to print
        monkeypatch.chdir(tmp_path)
        assert main(shlex.split(line)) == 0
        return
    assert main([*shlex.split(line), "--print_config"]) == 0
    assert ":" in capsys.readouterr().out


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 30
    assert len(commands_of(ROOT / "README.md")) >= 15
    assert {command.split()[0] for command in COMMANDS} == set(VERBS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    for name in re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+\.py)`", text_of(page)):
        folders = ("", "gpt_lightning", "tests", "benchmarks", "docs")
        assert any((ROOT / folder / name).is_file() for folder in folders), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(page)):
        assert (page.parent / target).exists(), target


def test_configuration_page_is_up_to_date() -> None:
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", text_of(ROOT / "constraints.txt"), re.M))
    for package in ("jsonargparse", "lightning"):  # their texts are on the page
        if version(package) != pinned[package]:
            pytest.skip(f"the page is made with {package} {pinned[package]}")
    if sys.version_info[:2] != (3, 11):  # another Python may spell types differently
        pytest.skip("the page is made with Python 3.11")
    generated = script("generate_configuration").page()
    assert text_of(DOCS / "configuration.md") == generated, (
        "run: python docs/generate_configuration.py"
    )


def test_configuration_page_has_every_setting() -> None:
    from lightning.pytorch import Trainer

    run = fields(gpt_lightning.RunConfig)
    groups = {
        "": [field.name for field in run if field.name not in ("model", "data", "trainer")],
        "evaluation.": [field.name for field in fields(gpt_lightning.EvaluationConfig)],
        "checkpoint.": [field.name for field in fields(gpt_lightning.CheckpointConfig)],
        "throughput.": [field.name for field in fields(gpt_lightning.ThroughputConfig)],
        "model.": [*signature(gpt_lightning.GPTLightningModule).parameters],
        "model.config.": [field.name for field in fields(gpt_lightning.GPTConfig)],
        "data.": [*signature(gpt_lightning.TextDataModule).parameters],
        "trainer.": [*signature(Trainer).parameters],
    }
    expected = {f"{prefix}{name}" for prefix, names in groups.items() for name in names}
    # groups of settings, and settings that seed_everything and rng set
    expected -= {"evaluation", "checkpoint", "throughput", "model.config"}
    expected -= {"model.seed", "model.rng", "data.seed", "data.rng"}
    listed = set(re.findall(r"^\| `--([\w.]+)`", text_of(DOCS / "configuration.md"), re.M))
    assert not expected - listed


def test_configuration_page_has_every_command() -> None:
    page = text_of(DOCS / "configuration.md")
    commands = {*VERBS, *(f"report {report}" for report in REPORTS)} - {"fit", "report"}
    assert commands == set(re.findall(r"^## Options of `(.+)`$", page, re.M))


def test_performance_page_is_up_to_date() -> None:
    page = text_of(DOCS / "performance.md")
    generator = script("generate_performance")
    assert set(re.findall(r"<!-- table: (\S+) -->", page)) == set(generator.TABLES)
    assert page == generator.page(page), "run: python docs/generate_performance.py"


def test_figure_of_the_schedules_is_up_to_date() -> None:
    generator = script("generate_schedules")
    with Image.open(generator.PICTURE) as picture:
        recorded = picture.info["Description"]
    assert recorded == generator.checksum(), "run: python docs/generate_schedules.py"


def test_api_page_has_every_public_name() -> None:
    listed = re.findall(r"^::: gpt_lightning\.(\S+)\.(\w+)$", text_of(DOCS / "python-api.md"), re.M)
    reports = [(module, name) for module, name in listed if module.startswith("reports.")]
    assert sorted(name for _, name in {*listed} - {*reports}) == sorted(gpt_lightning.__all__)
    assert {module for module, _ in reports} == {
        f"reports.{module}"
        for module in ("sampling", "sweep", "model_comparison", "comparison_results")
    }
    for module, name in reports:
        assert hasattr(import_module(f"gpt_lightning.{module}"), name)


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in text_of(p)], ids=name_of)
def test_python_examples_import_what_exists(page: Path) -> None:
    for example in re.findall(r"^```python\n(.*?)^```", text_of(page), re.M | re.S):
        compile(example, name_of(page), "exec")
        imports = "\n".join(re.findall(r"^(?:from|import) .+$", example, re.M))
        exec(imports, {})


def test_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= MAX_README_BYTES


def words_per_sentence(page: Path) -> float:
    """Mean over the sentences of the text, without code blocks, tables and headings; inline code is one word."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    sentences = []
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        if not re.match(r"\s*(?:\||#|:::)", block):
            sentences += re.split(r"(?<=[.!?])\*{0,2}\s+", block.strip())
    counts = [len(re.findall(r"[^\W_][\w'’.,-]*", sentence)) for sentence in sentences]
    counts = [count for count in counts if count]
    return sum(counts) / len(counts) if counts else 0.0


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name != "benchmarks"], ids=name_of
)
def test_sentences_are_short(page: Path) -> None:
    assert words_per_sentence(page) < MAX_WORDS_PER_SENTENCE
