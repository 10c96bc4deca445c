"""Entry point of the command line: runs the function of a command and turns errors into exit codes.

The module of a command is imported when the command is used, so ``generate`` does not wait for Lightning and
``--help`` waits for nothing.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from gpt_lightning.cli.config_files import with_config_paths
from gpt_lightning.cli.logs import OPTIONS_OF_EVERY_COMMAND, log_to_stderr
from gpt_lightning.cli.streams import is_closed_pipe, standard_streams

logger = logging.getLogger(__name__)

PROG = "gpt_lightning"

# command → (module in gpt_lightning.cli, function, help text)
VERBS = {
    "fit": (
        "fit",
        "fit",
        "train a GPTModel: a new run, a resumed run, or one from pretrained weights",
    ),
    "validate": (
        "fit",
        "validate",
        "compute loss and perplexity on the training and validation splits",
    ),
    "plan": (
        "plan",
        "run",
        "estimate the memory, disk space and time of a run, without running it",
    ),
    "generate": ("generate", "run", "continue prompts with a trained model"),
    "evaluate": ("evaluate", "run", "judge a model by HellaSwag, LAMBADA or WikiText"),
    "report": (
        "report",
        "run",
        "study a model: sampling, temperature × top_k, model sizes, training speed",
    ),
    "download": ("download", "run", "download GPT-2's public weights, or files of tasks"),
    "prepare": ("prepare", "run", "tokenize any amount of text into a token store"),
    "train-tokenizer": (
        "train_tokenizer",
        "run",
        "train a vocabulary of your own on any amount of text",
    ),
    "convert": ("convert", "run", "convert weights from one format to another"),
    "explore": ("explore", "run", "look into models on a page in the browser"),
    "serve": ("serve", "run", "answer requests in the form of OpenAI's completions API"),
    "tune": ("tune", "run", "search for the settings with the lowest validation loss"),
    "configs": ("configs", "run", "list the configurations of the package, or copy one"),
    "verify-resume": (
        "verify_resume",
        "run",
        "check that a killed and resumed run ends with the same bits on this machine",
    ),
}

REPORT_THAT_TRAINS = ["report", "speed"]
VERBS_WITH_SHORT_HELP = ("fit", "validate", "plan", "report speed")
HELP_FLAGS = ("-h", "--help")

MODULES_WITH_LIGHTNING = ("fit", "plan", "verify_resume", "report_speed", "tune")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: success. 1: a training run or a check failed. 2: the user made a mistake. 130, 143: SIGINT or SIGTERM stopped
    the command. 141: nobody reads standard output any more (``| head``).
    """
    if sys.platform == "win32":
        # Intel's Fortran library, if NumPy brings it, ends the process at Ctrl-C
        os.environ.setdefault("FOR_DISABLE_CONSOLE_CTRL_HANDLER", "1")
    arguments = list(sys.argv[1:] if argv is None else argv)
    quiet, verbose, debug = (flag in arguments for flag in ("--quiet", "--verbose", "--debug"))
    arguments = [a for a in arguments if a not in ("--quiet", "--verbose", "--debug")]
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    with (
        standard_streams(ignore_stdout_errors=_trains(arguments)) as stdout_errors,
        log_to_stderr(level),
        warnings.catch_warnings(),  # a notebook keeps its own filters
    ):
        try:
            try:
                if quiet and verbose:
                    raise ValueError("quiet: contradicts --verbose; give one of them")
                return _run(arguments)
            finally:
                sys.stdout.flush()  # a write error must appear here, not when Python exits
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            if stdout_errors.first is not None:
                return _report_stdout_error(stdout_errors.first)
            if isinstance(error, KeyboardInterrupt):
                logger.warning(f"interrupted {error}".rstrip())
                return 130
            if isinstance(error, SystemExit):
                return _exit_code(error)
            if debug or not isinstance(error, ValueError | OSError | FloatingPointError):
                raise
            logger.error(_one_line(error))
            return 1 if isinstance(error, FloatingPointError) else 2


def _trains(arguments: list[str]) -> bool:
    """Whether the command trains, so that its printed output is not its only result."""
    only_print = (*HELP_FLAGS, "--help-all", "--print_config")
    return arguments[:1] == ["fit"] and not any(
        argument.partition("=")[0] in only_print for argument in arguments
    )


def _exit_code(error: SystemExit) -> int:
    """The exit code of ``sys.exit(...)``, by which argparse ends after ``--help`` and ``--print_config``.

    In a notebook SystemExit would end the cell with a message.
    """
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def _report_stdout_error(error: OSError) -> int:
    """Log why standard output cannot be written; returns the exit code."""
    if is_closed_pipe(error):  # the exit code of a program that SIGPIPE ends
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
                from gpt_lightning.suggestions import suggest

                raise ValueError(f"{verb}: is not a command; {suggest(verb, VERBS)}")
            module, function, purpose = VERBS[verb]
            if arguments[:2] == REPORT_THAT_TRAINS:
                module, verb, rest = "report_speed", " ".join(REPORT_THAT_TRAINS), rest[1:]
                purpose = "compare the training speed of the book's model and of each improvement"
            if verb in VERBS_WITH_SHORT_HELP and not {*HELP_FLAGS}.isdisjoint(rest):
                from gpt_lightning.cli.short_help import short_help

                print(short_help(verb, purpose))
                return 0
            if module in MODULES_WITH_LIGHTNING:
                from gpt_lightning.cli.launcher import remove_stale_ranks

                remove_stale_ranks()
                if _trains(arguments):
                    from gpt_lightning.cli.first_line import log_first_line

                    log_first_line(rest)
                _hide_transformers()
                rest = with_config_paths(rest)
            elif sys.platform == "linux":
                # with it torch asks Linux for huge pages: it reads weights in float32 faster from them, and
                # nothing else; training does not change
                os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
            return getattr(import_module(f"gpt_lightning.cli.{module}"), function)(rest) or 0
    return 0


def _hide_transformers() -> None:
    """Make torchmetrics believe that transformers is not installed.

    Lightning imports torchmetrics, which imports transformers if it is installed: a fifth of the start-up time. The only
    loss is torchmetrics' text scores that need transformers, which this package does not use.
    """
    from lightning_utilities.core import imports

    def without_transformers(name: str) -> str:
        if name == "transformers":
            raise PackageNotFoundError(name)
        return version(name)

    # _version is private: a version of lightning_utilities without it only starts more slowly
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
    """The message of an error, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fsdecode(error.filename or 'file')}: {error.strerror}; check the path"
    return " ".join(str(error).split())
