"""Generator of ``docs/configuration.md``: every setting of every command, from the parsers themselves.

Usage: ``python docs/generate_configuration.py``. A test fails if the page is not up to date.
"""

import argparse
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from jsonargparse import ArgumentParser

from gpt_lightning.cli.help_format import HelpFormatter
from gpt_lightning.cli.main import VERBS
from gpt_lightning.cli.plan import PlanCLI
from gpt_lightning.cli.report import REPORTS
from gpt_lightning.cli.training_cli import TrainingCLI

PAGE = Path(__file__).parent / "configuration.md"

# prefix of the settings → heading and introduction
GROUPS = {
    "": ("The run", "Settings of the run itself, and what it starts from."),
    "model.": ("model", "Optimizer, learning rate, and how a step is computed."),
    "model.config.": (
        "model.config",
        "The architecture. With `--ckpt_path` or `--init_from` it comes from the weights.",
    ),
    "data.": ("data", "The text, its windows and the batches. See [batches](batches.md)."),
    "evaluation.": (
        "evaluation",
        "Losses, sample texts and tasks during training. See [evaluate](evaluate.md#during-training).",
    ),
    "checkpoint.": ("checkpoint", "Which checkpoints are saved. See [resume](resume.md)."),
    "throughput.": ("throughput", "The log of the training speed."),
    "trainer.": (
        "trainer",
        "Arguments of Lightning's `Trainer`, mostly with Lightning's descriptions. Some differ here: `gpt_lightning` writes "
        "checkpoints and TensorBoard events itself and validates with `evaluation.*`, so `limit_val_batches` is 0 "
        "unless it is given. `fit` warns about a setting that has no effect.",
    ),
}

INTRODUCTION = """\
# Configuration

`docs/generate_configuration.py` writes this page from the parsers of the commands. It lists every setting.

## How to give a setting

A setting has the same name everywhere:

| where | example |
|---|---|
| command line | `--model.lr 0.001` |
| YAML file | `model:` and below it `lr: 0.001` |
| Python | `RunConfig(model={"lr": 0.001})` |

- `--config FILE.yaml` reads a file. It may be given several times, and a later file wins over an earlier one.
- An option on the command line always wins over a file. If an option is given twice, the later value wins.
- `null` in a file or on the command line is Python's `None`.
- `--print_config` prints all settings of a command with their values, and runs nothing.
- `fit`, `validate` and `plan` have so many settings that `--help` shows the most important ones. `--help-all` shows all.
- A list such as `trainer.callbacks` is replaced by a new value. `--trainer.callbacks+=VALUE` appends to it.
- A YAML file may only name classes of `gpt_lightning`, `lightning` and `torch`. `--allow_import PACKAGE` adds a package; it
  works on the command line only.
- A key may be given once in a file. A misspelled or abbreviated key is an error; the message names the nearest key.
- `seed_everything` and `rng` apply to the model and to the data.

Every command also takes `--quiet` (only warnings, errors and results), `--verbose` (more messages, also Lightning's) and
`--debug` (the traceback of an error).

Exit codes: 0 success, 1 a run or a check failed, 2 a mistake of the user, 130 stopped by SIGINT, 143 stopped by
SIGTERM or SIGUSR1, 141 nobody reads the output (`| head`).

The environment variable `GPT_LIGHTNING_CACHE` names the folder for downloads and cached tokens. The default is
`~/.cache/gpt_lightning`.
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    fit = TrainingCLI("fit", [], None).parser
    parts = [INTRODUCTION, "## Settings of `fit`, `validate` and `plan`\n"]
    for prefix, (heading, text) in GROUPS.items():
        rows = [row for row in settings(fit) if group_of(row[0].removeprefix("--")) == prefix]
        parts += [f"### {heading}\n\n{text}\n", table(rows)]
    known = {name for name, *_ in settings(fit)}
    for verb, parser in other_parsers().items():
        takes_all_of_fit = verb in ("validate", "plan", "verify-resume", "report speed", "tune")
        rows = [row for row in settings(parser) if not (takes_all_of_fit and row[0] in known)]
        introduction = "Besides all settings of `fit`:\n\n" if takes_all_of_fit else ""
        parts += [f"## Options of `{verb}`\n", introduction + table(rows)]
    return "\n".join(parts)


def other_parsers() -> dict[str, argparse.ArgumentParser]:
    """Parser of each command except ``fit``."""
    parsers: dict[str, argparse.ArgumentParser] = {
        "validate": TrainingCLI("validate", [], None).parser,
        "plan": PlanCLI([]).parser,
        "report speed": TrainingCLI("report speed", [], None).parser,
    }
    modules = {verb: module for verb, (module, *_) in VERBS.items() if verb != "report"}
    modules |= {f"report {report}": module for report, (module, _) in REPORTS.items()}
    for verb, module in modules.items():
        if verb != "fit" and verb not in parsers:
            parsers[verb] = import_module(f"gpt_lightning.cli.{module}")._parser()
    return parsers


def settings(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and description of each option."""
    if isinstance(parser, ArgumentParser):
        parser.formatter_class = HelpFormatter
    formatter = parser._get_formatter()
    for action in parser._actions:
        name = action.dest
        if action.help == argparse.SUPPRESS or type(action).__name__ == "_ActionConfigLoad":
            continue
        if name in ("help", "help_all", "print_config") or name.endswith(".help"):
            continue
        is_option = f"--{name}" in action.option_strings
        if action.option_strings and not is_option:  # a link between two settings
            continue
        text = " ".join(formatter._expand_help(action).split())
        yield f"--{name}" if is_option else name, *split_help(text, action)


def split_help(text: str, action: argparse.Action) -> tuple[str, str, str]:
    """Split a help text of jsonargparse into type, default and description."""
    match = re.fullmatch(
        r"(?P<text>.*?) ?\((?P<required>required(?:, )?)?(?:type: (?P<type>.*?))?(?:, )?"
        r"(?:default: (?P<default>.*?))?(?:, known subclasses: .*)?\)",
        text,
    )
    if match is None:
        kind = "flag" if action.nargs == 0 else getattr(action.type, "__name__", "str")
        return kind, "", markdown(text)
    kind = "flag" if action.nargs == 0 else match["type"] or "str"
    default = "required" if match["required"] else match["default"] or ""
    return kind, readable_default(default), markdown(match["text"])


def readable_default(default: str) -> str:
    """The default as YAML has it; a tuple is a list."""
    return re.sub(r"^\((.*)\)$", r"[\1]", default)


def markdown(text: str) -> str:
    return text.replace("<|", "&lt;|").replace("|>", "|&gt;").replace("|", "\\|")


def group_of(name: str) -> str:
    """The longest prefix of ``GROUPS`` that a setting has."""
    return max((prefix for prefix in GROUPS if name.startswith(prefix)), key=len)


def table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, kind, default, text in rows:
        default = f"`{default}`" if default else ""
        lines.append(f"| `{name}` | {kind} | {default} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
