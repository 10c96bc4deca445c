"""The package: its layers, its imports, its start."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import gpt_lightning
from helpers import ROOT, python

PACKAGE = ROOT / "gpt_lightning"

# a folder may import from those below it; model and data know nothing of each other
_BASE = {"kernels", "storage"}
_MIDDLE = _BASE | {"evals", "generation", "pretrained", "model", "data"}
LAYERS = {
    "cli": _MIDDLE | {"cli", "training", "planning", "reports", "tuning", "serving", "exploring"},
    "training": _MIDDLE | {"training"},
    "planning": _MIDDLE | {"planning"},
    "reports": _MIDDLE | {"reports"},
    "tuning": _MIDDLE | {"tuning"},
    "serving": _MIDDLE | {"serving"},
    "exploring": _MIDDLE | {"exploring", "serving"},
    "evals": _BASE | {"evals", "model", "data"},
    "generation": _BASE | {"generation", "model", "data"},
    "pretrained": _BASE | {"pretrained", "model", "data"},
    "model": _BASE | {"model"},
    "data": _BASE | {"data"},
    "kernels": {"kernels"},
    "storage": {"storage"},
}
AT_TOP = {"figure", "palette", "suggestions", "table"}  # modules that any folder may use
PLAIN = PACKAGE / "reports" / "book_model.py"  # the reference, which must not use what it checks
MAY_IMPORT_LIGHTNING = ("cli/", "training/", "data/datamodule.py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_run_downwards(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    names = imported(path)
    if not place.startswith(MAY_IMPORT_LIGHTNING):
        assert not {
            name for name in names if name.split(".")[0] in ("lightning", "pytorch_lightning")
        }
    if path == PLAIN:
        assert not any(name.startswith("gpt_lightning") for name in names)
    if "/" in place and not place.startswith("cli/"):
        assert "gpt_lightning" not in names, "public names may come from any folder"
    if "/" in place:
        folders = {n.split(".")[1] for n in names if n.startswith("gpt_lightning.")}
        assert folders - AT_TOP <= LAYERS[place.split("/")[0]]


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "tests").rglob("*.py")),
    ids=lambda p: p.relative_to(ROOT / "tests").as_posix(),
)
def test_no_test_imports_from_a_test_file(path: Path) -> None:
    """What several test files use is in helpers.py and the modules beside it."""
    parts = {part for name in imported(path) for part in name.split(".")}
    assert not {part for part in parts if part.startswith("test_") or part == "conftest"}


# the private names of other packages that the package uses outside training/lightning_compat.py
PRIVATE_NAMES = {
    # jsonargparse has no public access to a parser's options and their types
    "cli/errors.py": "_actions _typehint",
    "cli/options.py": "_actions",
    "cli/parsing.py": "_actions _typehint",
    "cli/short_help.py": "_actions",
    "cli/text_options.py": "_actions _option_string_actions",
    "cli/wrapped_fit.py": "_option_string_actions",
    # Lightning
    "cli/main.py": "_version",
    "cli/plan.py": "_ddp_kwargs",
    # torch: nested containers of tensors, fake tensors, hooks, instructions of the CPU, oneDNN's linear layer, a state
    # dict's metadata, products with int4 weights, softmax's gradient
    "model/cpu_attention.py": "_softmax_backward_data",
    "model/gpt.py": "_forward_hooks _forward_pre_hooks",
    "model/int4_linear.py": "_convert_weight_to_int4pack_for_cpu _weight_int4pack_mm_for_cpu",
    "model/int8_linear.py": "_is_vnni_supported",
    "model/packed_linear.py": "_linear_pointwise _reorder_linear_weight",
    "pretrained/book.py": "_metadata",
    "training/checkpoint_io.py": "_pytree",
    "training/hashed_save.py": "_pytree",
    "training/distributed.py": "_pytree",
}


def private_names(path: Path) -> set[str]:
    """Private names in imports, attributes, keys and ``getattr`` with a constant."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.ImportFrom(module=str(module)):
                found.update(module.split("."), (alias.name for alias in node.names))
            case ast.Import():
                found.update(part for alias in node.names for part in alias.name.split("."))
            case ast.Attribute(attr=name):
                found.add(name)
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, second, *_]
            ):
                found.add(getattr(second, "value", ""))
            case ast.Subscript(slice=ast.Constant(value=str(key))):
                found.add(key)
    return {name for name in found if re.fullmatch("_[a-zA-Z].*", str(name))}


def names_we_define(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
            ):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                found.add(name)
    return found


def test_private_names_of_libraries_are_the_listed_ones() -> None:
    """A new name belongs in training/lightning_compat.py; a name that is no longer used leaves the list."""
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "lightning_compat.py"]
    ours = {"_asdict", "_replace"}.union(*map(names_we_define, files))
    used = {path.relative_to(PACKAGE).as_posix(): private_names(path) - ours for path in files}
    listed = {file: set(names.split()) for file, names in PRIVATE_NAMES.items()}
    assert {file: names for file, names in used.items() if names} == listed


def loaded_by(code: str) -> set[str]:
    result = python("-c", f"import sys; {code}; sys.stderr.write(' '.join(sys.modules))")
    assert result.returncode == 0, result.stderr
    return set(result.stderr.split())


def test_package_and_its_model_do_not_import_lightning() -> None:
    assert not {"lightning", "torch"} & loaded_by("import gpt_lightning")
    loaded = loaded_by("from gpt_lightning import GPTModel, generate, load_model, load_tokenizer")
    assert not {"lightning", "tokenizers", "requests"} & loaded


def test_gpt2s_tokenizer_does_not_import_the_package_tokenizers() -> None:
    code = "from gpt_lightning.cli.main import main; main(['generate', '--help']); "
    code += "from gpt_lightning import encode_prompt; encode_prompt('Every effort moves you')"
    assert not {"tokenizers", "huggingface_hub"} & loaded_by(code)


@pytest.mark.parametrize(
    ("arguments", "option", "left_out"),
    [
        (["generate", "--help"], "--temperature", {"lightning", "torch"}),
        (["fit", "--help"], "--model.lr", {"lightning", "torch"}),
        # test_module_runs_as_a_command imports the same
        pytest.param(
            ["fit", "--help-all"],
            "--model.lr",
            {"transformers", "tensorflow"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_help_imports_no_more_than_it_needs(
    arguments: list[str], option: str, left_out: set[str]
) -> None:
    code = f"from gpt_lightning.cli.main import main\nmain({arguments})"
    result = python("-c", f"import sys\n{code}\nsys.stderr.write(' '.join(sys.modules))")
    assert option in result.stdout
    assert not left_out & set(result.stderr.split())


def processor_seconds(*arguments: str) -> float:
    """The least processor time of three runs."""
    taken = []
    for _ in range(3):
        before = os.times()
        assert python(*arguments).returncode == 0
        after = os.times()
        own = after.children_user + after.children_system
        taken.append(own - before.children_user - before.children_system)
    return min(taken)


@pytest.mark.slow
def test_help_costs_little_more_than_lightning() -> None:
    lightning = processor_seconds("-c", "import lightning")
    assert processor_seconds("-m", "gpt_lightning", "--help") <= 0.3 * lightning
    assert processor_seconds("-m", "gpt_lightning", "fit", "--help") <= 0.3 * lightning
    assert processor_seconds("-m", "gpt_lightning", "fit", "--help-all") <= 1.3 * lightning


def test_script_is_the_same_command() -> None:
    script = Path(sys.executable).parent / "gpt-lightning"
    result = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"gpt_lightning {gpt_lightning.__version__}\n"


def test_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert metadata.version("gpt-lightning") == gpt_lightning.__version__


def test_package_declares_its_types() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_every_public_name_is_there() -> None:
    for name in gpt_lightning.__all__:
        assert getattr(gpt_lightning, name).__name__ == name
    with pytest.raises(AttributeError):
        gpt_lightning.nothing  # noqa: B018


def test_completion_shows_the_public_names() -> None:
    code = "import gpt_lightning; print([n for n in dir(gpt_lightning) if not n.startswith('_')])"
    result = python("-c", code)
    assert result.stdout.strip() == str(sorted(gpt_lightning.__all__)), result.stderr


def test_module_runs_as_a_command(tmp_path: Path) -> None:
    """``fit`` builds its parser without packages that it does not need."""
    fit = ("-m", "gpt_lightning", "fit", "--model.lrr=1")
    result = python("-X", "importtime", *fit, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    imports = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    assert "lightning" in imports
    assert not {"transformers", "tensorflow"} & imports
    assert [line for line in lines if not line.startswith("import time:")] == [
        "fit: new run; starting PyTorch and Lightning",
        "gpt_lightning: error: model.lrr: is not a setting; did you mean model.lr?",
    ]
    assert os.listdir(tmp_path) == []


def text_without_encoding(path: Path) -> list[str]:
    """Calls that open a text file or a process's text in the system's encoding, which is not UTF-8 on Windows."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg for keyword in node.keywords}
        match node.func:
            case ast.Attribute(value=ast.Name(id="os" | "gzip"), attr="open"):
                continue
            case ast.Name(id="open") | ast.Attribute(attr="open" | "fdopen"):
                modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
                is_text = not any(re.fullmatch("[rwax]?b|r[+]b", str(mode)) for mode in modes)
            case ast.Attribute(attr="read_text" | "write_text"):
                is_text = True
            case ast.Attribute(value=ast.Name(id="subprocess")):
                is_text = bool(keywords & {"text", "universal_newlines"})
            case _:
                is_text = False
        if is_text and "encoding" not in keywords:
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_text_files_are_opened_with_their_encoding() -> None:
    assert [call for path in PACKAGE.rglob("*.py") for call in text_without_encoding(path)] == []


def test_text_file_without_encoding_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    for line, is_found in [
        ("open('a')", True),
        ("path.open('a', newline='')", True),
        ("path.read_text()", True),
        ("subprocess.run(['x'], text=True)", True),
        ("open('a', encoding='utf-8')", False),
        ("path.open('r+b')", False),
        ("os.open('a', os.O_RDONLY)", False),
    ]:
        file.write_text(line)
        assert bool(text_without_encoding(file)) == is_found, line
