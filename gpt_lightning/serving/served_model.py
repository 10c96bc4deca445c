"""A model that clients can name, and the thread that calls it."""

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.model.config import gpt2_size
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.pretrained.load import load_for_text
from gpt_lightning.serving.model_thread import ModelThread
from gpt_lightning.serving.worker import ModelWorker, WorkerLimits

_FILES_OF_RUNS = ("last", "best", "model", "pytorch_model")


@final
@dataclass(frozen=True)
class ServedModel:
    """A loaded model.

    Attributes:
        id: Its name for clients, without the path.
        created: When it was loaded, in seconds since 1970.
    """

    id: str
    model: GPTModel
    tokenizer: Tokenizer
    worker: ModelWorker
    created: int

    def close(self) -> None:
        """Give up its requests."""
        self.worker.close()


@dataclass(frozen=True)
class LoadSettings:
    """How the models of all SOURCEs are loaded.

    Args:
        dtype: Of the weights; ``None``: as stored.
        n_heads: Only for a file of the book's own code, which does not contain it.
    """

    device: str = "cpu"
    dtype: torch.dtype | None = None
    n_heads: int | None = None


def load_served_model(
    source: str, model_id: str, settings: LoadSettings, thread: ModelThread, limits: WorkerLimits
) -> ServedModel:
    """Load the model that SOURCE names. Errors are those of :func:`gpt_lightning.pretrained.load.load_for_text`."""
    model, tokenizer = load_for_text(
        source, device=settings.device, dtype=settings.dtype, n_heads=settings.n_heads
    )
    for parameter in model.parameters():  # a file that is mapped into memory may be overwritten
        parameter.data = parameter.data.clone()
    tokenizer.load()
    worker = ModelWorker(model, tokenizer, thread, limits)
    return ServedModel(model_id, model, tokenizer, worker, int(time.time()))


def model_ids(sources: Iterable[str]) -> list[str]:
    """A name for each SOURCE: the last part of its path, with the folder's for ``last.ckpt`` and ``best.ckpt``.

    Equal names get a number.
    """
    ids: list[str] = []
    for source in sources:
        name = _model_name(source)
        number = 1
        while (unique := name if number == 1 else f"{name}-{number}") in ids:
            number += 1
        ids.append(unique)
    return ids


def _model_name(source: str) -> str:
    path = Path(os.path.expanduser(source))
    if not path.exists() and (size := gpt2_size(source)) is not None:
        return size
    path = Path(os.path.abspath(path))  # without "..", and with the name of a link
    name = path.stem if path.suffix in (".ckpt", ".pth", ".pt", ".safetensors") else path.name
    if name in _FILES_OF_RUNS:
        name = f"{path.parent.name}-{name}"
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "model"
