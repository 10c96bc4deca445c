"""The tasks by name: their files, what a model must score, and the numbers that follow from the scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.evals.last_word import LastWordResult, last_word_requests, last_word_result
from gpt_lightning.evals.likelihood import (
    Likelihood,
    Request,
    check_requests,
    is_cropped,
    log_likelihoods,
)
from gpt_lightning.evals.multiple_choice import ChoiceResult, choice_requests, choice_result
from gpt_lightning.evals.perplexity import PerplexityResult, page_requests, perplexity_result
from gpt_lightning.evals.task_downloads import find_task_file
from gpt_lightning.evals.task_files import read_choices, read_last_words, read_pages
from gpt_lightning.evals.task_names import TaskName
from gpt_lightning.model.gpt import GPTModel

TaskResult = ChoiceResult | LastWordResult | PerplexityResult
Examples = Sequence[Any]


@dataclass(frozen=True)
class Task:
    """A task for one tokenizer and one context length.

    Attributes:
        requests: What the model must score.
        judge: Makes the result of the scores.
    """

    name: TaskName
    context_length: int
    requests: Sequence[Request]
    judge: Callable[[Sequence[Sequence[Likelihood]]], TaskResult]

    @property
    def texts(self) -> int:
        """Number of continuations that are scored."""
        return sum(len(request.continuations) for request in self.requests)

    def numbers(self, answers: Sequence[Sequence[Likelihood]]) -> dict[str, Any]:
        """The result, and how many contexts were cropped to fit the model."""
        numbers: dict[str, Any] = {"task": self.name, **asdict(self.judge(answers))}
        if self.name != "wikitext":  # its windows are made to fit
            cropped = (is_cropped(request, self.context_length) for request in self.requests)
            numbers["cropped"] = sum(cropped)
        return numbers

    def evaluate(
        self,
        model: GPTModel,
        batch_size: int,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Any]:
        """:meth:`numbers` of a model in eval mode; arguments as for :func:`log_likelihoods`."""
        return self.numbers(log_likelihoods(model, self.requests, batch_size, on_progress))


def read_examples(name: TaskName, file: str, limit: int | None = None) -> Examples:
    """The first examples of a task's file; ``None``: all of them.

    Raises:
        ValueError, OSError: The file cannot be read, or an example is damaged; the message has its line.
    """
    read: dict[TaskName, Callable[[str], Examples]] = {
        "hellaswag": read_choices,
        "lambada": read_last_words,
        "wikitext": read_pages,
    }
    return read[name](file)[:limit]


def make_task(
    name: TaskName,
    examples: Examples,
    tokenizer: Tokenizer,
    context_length: int,
    stride: int | None = None,
) -> Task:
    """The task of some examples.

    Args:
        stride: Of WikiText's windows, in tokens; ``None``: they do not overlap.

    Raises:
        ValueError: A continuation is empty, or longer than the context.
    """
    if name == "hellaswag":
        requests = choice_requests(tokenizer, examples)
        judge: Callable[..., TaskResult] = partial(choice_result, examples)
    elif name == "lambada":
        requests, judge = last_word_requests(tokenizer, examples), last_word_result
    else:
        requests = page_requests(tokenizer, examples, context_length, stride or context_length)
        judge = partial(perplexity_result, examples)
    check_requests(requests, context_length)
    return Task(name, context_length, requests, judge)


def read_tasks(
    tasks: Mapping[TaskName, str | None], setting: str, limit: int | None = None
) -> dict[TaskName, Examples]:
    """The first examples of each task of :func:`named_tasks`.

    Raises:
        ValueError, OSError: A file is missing or damaged.
    """
    examples: dict[TaskName, Examples] = {}
    for name, file in tasks.items():
        try:
            path = find_task_file(name, f"{setting} {{{name}: FILE}}") if file is None else file
            examples[name] = read_examples(name, path, limit)
        except (ValueError, OSError) as error:
            raise type(error)(f"{setting}: {error}") from error
    return examples
