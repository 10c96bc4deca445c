"""``download``: download GPT-2's public weights, or the files of tasks, into the cache."""

import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser

from gpt_lightning.cli.console import SECONDS_BETWEEN_LINES, byte_progress
from gpt_lightning.cli.options import CONFIG_HELP
from gpt_lightning.cli.parsing import parse
from gpt_lightning.evals.task_names import DOWNLOAD_NAMES
from gpt_lightning.model.config import GPT2_NAMES, gpt2_size
from gpt_lightning.suggestions import suggest

if TYPE_CHECKING:
    from rich.progress import TaskID

logger = logging.getLogger(__name__)


def run(arguments: list[str]) -> None:
    """Download the weights of a GPT-2, or the file of a task: hellaswag, lambada or wikitext-2.

    Afterwards --from NAME and --init_from NAME find the weights, and evaluate --task NAME finds the file. Existing files are verified; only missing and damaged files are downloaded. Interrupted downloads resume.
    """
    settings = parse(_parser(), arguments)
    task = {name: task for task, name in DOWNLOAD_NAMES.items()}.get(settings.name)
    name = settings.name if task else gpt2_size(settings.name)
    if name is None:
        known = [*GPT2_NAMES, *DOWNLOAD_NAMES.values()]
        raise ValueError(
            f"{settings.name}: is neither a size of GPT-2 nor a task; {suggest(settings.name, known)}"
        )
    if task and settings.host != "hub":
        raise ValueError(f"host: {settings.host} has only weights, not {name}; leave it out")
    with _DownloadProgress() as progress:
        options: dict[str, Any] = {
            "folder": Path(os.path.expanduser(settings.out)) if settings.out else None,
            "mirror": settings.mirror,
            "on_bytes": progress.advance,
            "on_damage": lambda path: logger.info(f"{path}: is damaged; downloading it again"),
        }
        if task:
            from gpt_lightning.evals.task_downloads import download_task

            folder = download_task(task, **options)
        else:
            from gpt_lightning.pretrained.download import download

            folder = download(name, settings.host, **options)
    if settings.json:
        files = {
            file.name: file.stat().st_size
            for file in sorted(folder.iterdir())
            if not file.name.startswith(".")
        }
        print(json.dumps({"name": name, "folder": str(folder), "files": files}))
    else:
        print(folder)


class _DownloadProgress:
    """Progress on stderr: a bar for each file on a terminal, otherwise a line now and then."""

    def __init__(self) -> None:
        self._bars = byte_progress()
        self._tasks: dict[str, TaskID] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> "_DownloadProgress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def advance(self, name: str, done: int, size: int | None) -> None:
        if not self._bars.disable:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name)
            self._bars.update(self._tasks[name], completed=done, total=size)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            total = f" of {size / 1e6:,.0f}" if size else ""
            logger.info(f"{name}: {done / 1e6:,.0f}{total} MB")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gpt_lightning download", description=run.__doc__, exit_on_error=False
    )
    add = parser.add_argument
    add("--config", action="config", help=CONFIG_HELP)
    add(
        "name",
        type=str,
        help="gpt2-124M, gpt2-355M, gpt2-774M or gpt2-1558M; or Hugging Face's names of them: gpt2, gpt2-medium, "
        "gpt2-large, gpt2-xl. Or the file of a task: hellaswag, lambada, wikitext-2.",
    )
    add(
        "--host",
        type=Literal["hub", "openai"],
        default="hub",
        help="Of weights: hub = safetensors from Hugging Face; openai = the original TensorFlow files.",
    )
    add(
        "--out",
        type=str | None,
        metavar="FOLDER",
        help="The folder for the files; null = the cache, where the commands find them.",
    )
    add("--mirror", type=str | None, metavar="URL", help="A host to try before the others.")
    add("--json", action="store_true", help="Print one JSON object and nothing else.")
    return parser
