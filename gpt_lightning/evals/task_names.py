"""Names of the tasks and of their numbers. Nothing here imports torch: the parsers of the commands need it at once."""

from collections.abc import Mapping
from typing import Literal, get_args

from gpt_lightning.suggestions import suggest

TaskName = Literal["hellaswag", "lambada", "wikitext"]
TASK_NAMES: tuple[TaskName, ...] = get_args(TaskName)
# how a user names tasks: one, several, or each with its file
GivenTasks = dict[str, str | None] | list[str] | str

# the name of each task's official file in the command download
DOWNLOAD_NAMES: dict[TaskName, str] = {
    "hellaswag": "hellaswag",
    "lambada": "lambada",
    "wikitext": "wikitext-2",
}

# the numbers of each task that compare models
METRICS: dict[TaskName, tuple[str, ...]] = {
    "hellaswag": ("acc", "acc_norm"),
    "lambada": ("acc", "perplexity"),
    "wikitext": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
}


def named_tasks(given: GivenTasks | None, setting: str) -> dict[TaskName, str | None]:
    """Each task that a user names, and its file; ``None``: the downloaded one.

    Args:
        setting: The name of the option, for messages.

    Raises:
        ValueError: A task is unknown, or named twice.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        pairs = list(given.items())
    else:
        pairs = [(name, None) for name in ([given] if isinstance(given, str) else given)]
    tasks: dict[TaskName, str | None] = {}
    for name, file in pairs:
        if name not in TASK_NAMES:
            raise ValueError(f"{setting}: {name} is not a task; {suggest(str(name), TASK_NAMES)}")
        if name in tasks:
            raise ValueError(f"{setting}: {name} is given twice; leave one out")
        tasks[name] = file
    return tasks
