"""Help of ``fit``, ``validate`` and ``plan`` on one screen: the settings that are changed most often.

The parser of these commands needs Lightning, whose import takes seconds. So this module reads descriptions and
defaults from the source text of the classes that the parser reads them from.
"""

import ast
import re
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser

from gpt_lightning.cli.logs import QUIET_HELP
from gpt_lightning.cli.options import add_options, help_texts

WIDTH = 80

# command → group → settings
GROUPS = {
    "fit": {
        "Run": "config run ckpt_path init_from",
        "Data": "data.text data.batch_size data.global_batch_size",
        "Model": "model.config.context_length model.config.emb_dim model.config.n_heads "
        "model.config.n_layers model.config.drop_rate",
        "Training": "model.lr trainer.max_epochs trainer.max_steps trainer.accelerator trainer.devices "
        "trainer.precision",
        "Evaluation and checkpoints": "evaluation.eval_freq evaluation.eval_iter "
        "checkpoint.every_n_train_steps",
        "Output": "quiet print_config",
    },
    "validate": {
        "Weights": "init_from ckpt_path run",
        "Data (without --config: the data of the run)": "config data.text "
        "data.train_ratio data.context_length data.stride data.batch_size",
        "Devices": "trainer.accelerator trainer.devices trainer.precision",
        "Output": "json quiet print_config",
    },
    "plan": {
        "Run": "config init_from",
        "Data": "data.text data.batch_size data.global_batch_size",
        "Model": "model.config.context_length model.config.emb_dim model.config.n_heads "
        "model.config.n_layers",
        "Training": "trainer.max_epochs trainer.max_steps train_tokens trainer.precision "
        "model.loss_chunk_size model.activation_checkpointing",
        "Devices": "gpu devices device_memory_gb peak_tflops mfu",
        "Output": "json quiet print_config",
    },
    "report speed": {
        "Model": "config model.config.context_length model.config.emb_dim model.config.n_heads "
        "model.config.n_layers",
        "Data": "data.text data.batch_size",
        "Training": "model.lr model.loss_chunk_size trainer.accelerator",
        "Output": "minutes out json quiet print_config",
    },
}

EXAMPLES = {
    "fit": (
        "fit --config configs/quickstart.yaml --data.text a.txt",
        "fit --config configs/verdict.yaml --ckpt_path last",
    ),
    "validate": (
        "validate --init_from checkpoints/quickstart/best",
        "validate --config configs/gpt2.yaml --data.text my.txt",
    ),
    "plan": (
        "plan --config configs/pretrain-124M.yaml --gpu H100",
        "plan --config configs/gpt2.yaml --init_from gpt2-355M",
    ),
    "report speed": (
        "report speed --config quickstart --minutes 1",
        "report speed --config verdict --out speed",
    ),
}

# prefix of settings → file and class with their descriptions and defaults
_CLASSES = {
    "": ("training/config.py", "RunConfig"),
    "evaluation": ("training/config.py", "EvaluationConfig"),
    "checkpoint": ("training/config.py", "CheckpointConfig"),
    "model": ("training/module.py", "GPTLightningModule"),
    "model.config": ("model/config.py", "GPTConfig"),
    "data": ("data/datamodule.py", "TextDataModule"),
}


def short_help(verb: str, purpose: str) -> str:
    """Return the help of a command, at most 80 columns and 39 lines: a terminal of 40 also shows the prompt.

    Args:
        purpose: What the command does.
    """
    column = 4 + max(len(f"--{name}") for names in GROUPS[verb].values() for name in names.split())
    lines = [
        f"usage: gpt_lightning {verb} [--config FILE.yaml] [--SETTING VALUE ...]",
        "",
        f"{purpose[0].upper()}{purpose[1:]}.",
        "",
    ]
    for group, names in GROUPS[verb].items():
        lines.append(f"{group}:")
        for name in names.split():
            rows = wrap(_sentence(verb, name), WIDTH - column)
            lines.append(f"  --{name}".ljust(column) + rows[0])
            lines += [" " * column + row for row in rows[1:]]
    lines += ["Examples:", *(f"  python -m gpt_lightning {line}" for line in EXAMPLES[verb])]
    lines += ["", "[...] is a default. All settings: --help-all"]
    return "\n".join(lines)


def _sentence(verb: str, name: str) -> str:
    """The first clause of a setting's help text, and its default if it has one."""
    text, default = _described(verb, name)
    clause = re.split(r"[.;] |\.$", text, maxsplit=1)[0]
    of_the_run = verb == "validate" and name.startswith("data.")
    if default is None or of_the_run:
        return clause
    return f"{clause} [{str(default).lower() if isinstance(default, bool) else default}]"


def _described(verb: str, name: str) -> tuple[str, Any]:
    """Help text and default of a setting; ``None``: no default that the text does not explain."""
    if name == "quiet":  # which main takes out of the arguments
        return f"Show {QUIET_HELP}.", None
    if name in help_texts(verb):
        return help_texts(verb)[name], None
    if name in (own := _own_options(verb)):
        return own[name]
    prefix, _, argument = name.rpartition(".")
    text, node = _arguments(*_CLASSES[prefix])[argument]
    return text, ast.literal_eval(node)


@cache
def _own_options(verb: str) -> dict[str, tuple[str, Any]]:
    """Option of a command that is not a setting of a run → help text and default."""
    parser = ArgumentParser()
    add_options(parser, verb)
    return {
        action.dest: (str(action.help), None if action.nargs == 0 else action.default)
        for action in parser._actions
    }


@cache
def _arguments(file: str, class_name: str) -> dict[str, tuple[str, ast.expr]]:
    """Argument with a default → description and default, from the source text of a class.

    A dataclass has its defaults in its fields, any other class in ``__init__``.
    """
    source = (Path(__file__).parent.parent / file).read_text(encoding="utf-8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    node = next(node for node in classes if node.name == class_name)
    defaults: dict[str, ast.expr] = {}
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                defaults[name] = value
            case ast.FunctionDef(name="__init__", args=arguments):
                names = [argument.arg for argument in arguments.args]
                defaults.update(zip(reversed(names), reversed(arguments.defaults), strict=False))
    return {
        param.arg_name: (" ".join((param.description or "").split()), defaults[param.arg_name])
        for param in docstring_parser.parse(ast.get_docstring(node) or "").params
        if param.arg_name in defaults
    }
