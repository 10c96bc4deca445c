"""Verbs to functions. The only room that parses arguments and ends a process.

Each verb's module is imported when the verb is used, so that ``generate`` does not wait for Lightning
and ``--help`` for nothing.
"""

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from gpt_lightning.cli.logs import OPTIONS_OF_EVERY_COMMAND, log_to_stderr
from gpt_lightning.cli.streams import standard_streams

logger = logging.getLogger(__name__)

PROG = "gpt_lightning"

# verb → (module, function, what it does)
VERBS = {
    "fit": ("fit", "fit", "train a GPTModel, go on with a run, or start from old weights"),
    "validate": ("fit", "validate", "loss and perplexity on the training and validation split"),
    "plan": ("plan", "run", "what a run will take: memory, disk, time; runs nothing"),
    "generate": ("generate", "run", "continue prompts with a trained model"),
    "report": ("report", "run", "sampling: next-token frequencies; sweep: temperature × top_k"),
    "download": ("download", "run", "fetch GPT-2's public weights"),
    "prepare": ("prepare", "run", "any amount of text into a token store"),
    "convert": ("convert", "run", "weights from one form to another"),
    "verify-resume": (
        "verify_resume",
        "run",
        "prove that a killed run loses nothing on this machine",
    ),
}

WITH_LIGHTNING = ("fit", "plan", "verify_resume")  # modules


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0; 2 for a user's mistake; 1 for a run that failed or a check that did; 130 or 143 for one that was
    stopped by SIGINT or SIGTERM; 141 for a result whose reader has gone.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    quiet, verbose, debug = (flag in arguments for flag in ("--quiet", "--verbose", "--debug"))
    arguments = [a for a in arguments if a not in ("--quiet", "--verbose", "--debug")]
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    with standard_streams(run_goes_on=_trains(arguments)) as lost, log_to_stderr(level):
        try:
            try:
                if quiet and verbose:
                    raise ValueError("quiet: contradicts --verbose; give one of them")
                return _run(arguments)
            finally:
                sys.stdout.flush()  # what cannot be written is known here, not when Python ends
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            if lost.error is not None:
                return _lost_output(lost.error)
            if isinstance(error, KeyboardInterrupt):
                logger.warning(f"interrupted {error}".rstrip())
                return 130
            if debug or not isinstance(error, ValueError | OSError | FloatingPointError):
                raise
            logger.error(_one_line(error))
            return 1 if isinstance(error, FloatingPointError) else 2


def _trains(arguments: list[str]) -> bool:
    """Whether the command is more than what it prints."""
    asks = ("-h", "--help", "--print_config")
    return arguments[:1] == ["fit"] and not any(
        argument.partition("=")[0] in asks for argument in arguments
    )


def _lost_output(error: OSError) -> int:
    if isinstance(error, BrokenPipeError):  # as a shell reports a program that SIGPIPE has ended
        return 141
    logger.error(f"standard output: cannot be written ({error.strerror}); redirect it elsewhere")
    return 2


def _run(arguments: list[str]) -> int:
    match arguments:
        case [] | ["-h" | "--help", *_]:
            print(_help())
        case ["--version", *_]:
            from gpt_lightning import __version__

            print(f"{PROG} {__version__}")
        case [verb, *rest]:
            if verb not in VERBS:
                from gpt_lightning.cli.suggestions import suggest

                raise ValueError(f"{verb}: is no command; {suggest(verb, VERBS)}")
            module, function, _ = VERBS[verb]
            if module in WITH_LIGHTNING:
                from gpt_lightning.cli.launcher import forget_leftover_ranks

                forget_leftover_ranks()
                _block_transformers()
            return getattr(import_module(f"gpt_lightning.cli.{module}"), function)(rest) or 0
    return 0


def _block_transformers() -> None:
    """torchmetrics, and so Lightning, imports transformers where it is installed: a fifth of a start.

    The scores of texts that torchmetrics has it for are absent then, as they are where it is not installed.
    """
    from lightning_utilities.core import imports

    def without_transformers(name: str) -> str:
        if name == "transformers":
            raise PackageNotFoundError(name)
        return version(name)

    # a private name, which mypy does not know; where it is no more, a start takes longer
    if getattr(imports, "_version", None) is version:
        setattr(imports, "_version", without_transformers)  # noqa: B010


def _help() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [options]",
            "",
            "Train, resume, examine and sample GPT models with PyTorch Lightning.",
            "",
            "commands:",
            *(f"  {verb:<{width}}  {what}" for verb, (_, _, what) in VERBS.items()),
            "",
            f"'{PROG} COMMAND --help' lists a command's options.",
            OPTIONS_OF_EVERY_COMMAND,
        ]
    )


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fsdecode(error.filename or 'file')}: {error.strerror}; check the path"
    return " ".join(str(error).split())
