"""The models that the page shows: loaded when they are first used, and again when their files have changed."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TypeVar, final

from torch import Tensor

from gpt_lightning.exploring.checkpoints import Checkpoint, Checkpoints
from gpt_lightning.exploring.inside import attention_weights
from gpt_lightning.exploring.next_token import NextToken, NextTokenReader
from gpt_lightning.exploring.tokens import Json
from gpt_lightning.model.flops import parameters
from gpt_lightning.serving.api_errors import APIError
from gpt_lightning.serving.generation_request import BusyError
from gpt_lightning.serving.served_model import ServedModel
from gpt_lightning.serving.worker import as_memory_error

logger = logging.getLogger(__name__)

MAX_LAZY_MODELS = 3
_MAX_NEXT_TOKENS = 96  # per model: 0.4 MB each with GPT-2's vocabulary
_RETIRED_POLL_SECONDS = 0.5

T = TypeVar("T")
LoadModel = Callable[[str, str], ServedModel]


@final
class LoadedModel:
    """A model in memory, and what was looked at last.

    Attributes:
        revision, step: Those of the checkpoint when it was loaded.
        num_users: Requests that use it now.
    """

    def __init__(self, served: ServedModel, revision: int, step: int | None) -> None:
        self.served = served
        self.revision = revision
        self.step = step
        self.num_users = 0
        self._reader = NextTokenReader(served.model)
        self._next_tokens: OrderedDict[tuple[int, ...], NextToken] = OrderedDict()
        self._attention: tuple[tuple[int, list[int]], Tensor] | None = None

    async def run(self, function: Callable[[], T]) -> T:
        """Result of ``function()`` on the thread of the models; a lack of memory raises ``MemoryError``."""
        try:
            return await self.served.worker.run(function)
        except RuntimeError as error:
            raise as_memory_error(error) from error

    async def next_tokens(self, ids: Sequence[int], lengths: Sequence[int]) -> list[NextToken]:
        """What follows the first L of ``ids``, for each L of ``lengths``. Known results are not computed again."""
        context_length = self.served.model.config.context_length
        keys = [tuple(ids[max(0, length - context_length) : length]) for length in lengths]
        known = {key: self._next_tokens[key] for key in keys if key in self._next_tokens}
        missing = {key: n for key, n in zip(keys, lengths, strict=True) if key not in known}
        fitting = {key: n for key, n in missing.items() if n <= context_length}
        # one job for each window that is cropped: other requests have their turn between two
        cropped = [{key: n} for key, n in missing.items() if n > context_length]
        for job in filter(None, [fitting, *cropped]):
            read = await self.run(partial(self._reader.read, ids, [*job.values()]))
            known |= zip(job, read, strict=True)
        for key in keys:
            self._next_tokens[key] = known[key]
            self._next_tokens.move_to_end(key)
        while len(self._next_tokens) > _MAX_NEXT_TOKENS:
            self._next_tokens.popitem(last=False)
        return [known[key] for key in keys]

    async def attention(self, ids: list[int], layer: int, num_rows: int) -> Tensor:
        """Weights ``(H, num_rows, T)`` of one block. The last ones are kept, so that each head is shown at once."""
        key = (layer, ids)
        if self._attention is not None and self._attention[0] == key:
            return self._attention[1]
        compute = partial(attention_weights, self.served.model, ids, layer, num_rows)
        weights = await self.run(compute)
        self._attention = (key, weights)
        return weights


@final
class Explorer:
    """Models by their ids. SOURCEs stay in memory; of the other checkpoints, those that were used last.

    A model that is replaced answers the requests that it has begun.

    Args:
        sources: SOURCE of each id.
        load: Loads the model of a SOURCE under an id.

    Attributes:
        models: The models of the SOURCEs; a newer checkpoint takes the place of the older one.

    Raises:
        OSError: A SOURCE does not exist.
    """

    def __init__(self, sources: Mapping[str, str], load: LoadModel) -> None:
        self.models: dict[str, ServedModel] = {}
        self._load = load
        self._checkpoints = Checkpoints(sources)
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()
        self._disk_lock = asyncio.Lock()
        self._load_lock = asyncio.Lock()  # two models that load at once may not fit in memory
        self._closing: set[asyncio.Task[None]] = set()

    def load_sources(self) -> None:
        """Load the models of the SOURCEs, before the server starts. Errors are those of ``load``."""
        for checkpoint in self._checkpoints.sources:
            checkpoint.refresh()
            revision, step = checkpoint.revision, checkpoint.step
            served = self._load(checkpoint.location, checkpoint.id)
            self._loaded[checkpoint.id] = LoadedModel(served, revision, step)
            self.models[checkpoint.id] = served

    async def state(self) -> list[Json]:
        """Entries of all models: what is on disk, and what is loaded."""
        return [self._entry(checkpoint) for checkpoint in await self._refresh()]

    @asynccontextmanager
    async def use(self, model_id: str) -> AsyncIterator[LoadedModel]:
        """The model with this id, for one request; it is loaded if it is not in memory.

        Raises:
            APIError: There is no such model, or it cannot be loaded.
        """
        loaded = await self._loaded_model(model_id)
        loaded.num_users += 1
        try:
            yield loaded
        finally:
            loaded.num_users -= 1

    async def _loaded_model(self, model_id: str) -> LoadedModel:
        if model_id in self._loaded:
            self._loaded.move_to_end(model_id)
            return self._loaded[model_id]
        checkpoint = await self._find(model_id)
        async with self._load_lock:
            if model_id not in self._loaded:
                await self._load_now(checkpoint)
            return self._loaded[model_id]

    async def reload(self, model_id: str) -> Json:
        """Load the newest file of a model, unless it is loaded. Returns the model's entry."""
        checkpoint = await self._find(model_id)
        async with self._load_lock:
            loaded = self._loaded.get(model_id)
            if loaded is None or loaded.revision != checkpoint.revision:
                await self._load_now(checkpoint)
        return self._entry(checkpoint)

    async def _refresh(self) -> list[Checkpoint]:
        async with self._disk_lock:
            kept = frozenset(self._loaded)
            return await asyncio.to_thread(self._checkpoints.refresh, kept)

    async def _find(self, model_id: str) -> Checkpoint:
        checkpoints = {checkpoint.id: checkpoint for checkpoint in await self._refresh()}
        if model_id not in checkpoints:
            message = f"model: is not one of this server's; give one of {', '.join(checkpoints)}"
            raise APIError(404, message, param="model", code="model_not_found")
        return checkpoints[model_id]

    async def _load_now(self, checkpoint: Checkpoint) -> None:
        """Load a model, in place of the one that is loaded."""
        # the file may change while it is read; then its revision is already a newer one
        revision, step = checkpoint.revision, checkpoint.step
        try:
            served = await asyncio.to_thread(self._load, checkpoint.location, checkpoint.id)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            logger.warning(f"{checkpoint.id}: cannot be loaded: {error}")
            message = f"{checkpoint.id}: {_cause(error)}"  # the error itself names a path
            raise APIError(500, message, param="model", code="load_failed") from error
        previous = self._loaded.pop(checkpoint.id, None)
        self._loaded[checkpoint.id] = LoadedModel(served, revision, step)
        if previous is not None:
            self._retire(previous)
        sources = {source.id for source in self._checkpoints.sources}
        if checkpoint.id in sources:
            self.models[checkpoint.id] = served
        lazy = [model_id for model_id in self._loaded if model_id not in sources]
        for model_id in lazy[:-MAX_LAZY_MODELS]:
            self._retire(self._loaded.pop(model_id))

    def _retire(self, loaded: LoadedModel) -> None:
        """Close a model when its last request has ended."""
        task = asyncio.create_task(_close_when_unused(loaded))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _entry(self, checkpoint: Checkpoint) -> Json:
        loaded = self._loaded.get(checkpoint.id)
        config = None if loaded is None else loaded.served.model.config
        return {
            "id": checkpoint.id,
            "source": checkpoint.source,
            "checkpoint": checkpoint.name,
            "step": checkpoint.step,
            "is_loaded": loaded is not None,
            "revision": checkpoint.revision,
            "loaded_revision": None if loaded is None else loaded.revision,
            "loaded_step": None if loaded is None else loaded.step,
            **{
                name: None if config is None else getattr(config, name)
                for name in ("n_layers", "n_heads", "emb_dim", "context_length", "vocab_size")
            },
            "num_parameters": None if config is None else parameters(config),
        }


async def _close_when_unused(loaded: LoadedModel) -> None:
    served = loaded.served

    def close_if_idle() -> bool:
        """Between two decoding steps: within one, a row may be neither waiting nor in the batch."""
        if served.worker.has_work:
            return False
        served.close()
        return True

    is_closed = False
    while not is_closed:
        await asyncio.sleep(_RETIRED_POLL_SECONDS)
        if not loaded.num_users:
            with suppress(BusyError):
                is_closed = await loaded.run(close_if_idle)


def _cause(error: Exception) -> str:
    """Why a model could not be loaded, without a path of the disk."""
    if isinstance(error, FileNotFoundError):
        return "its file is gone; choose another checkpoint"
    if isinstance(error, RuntimeError | MemoryError):
        return "does not fit in memory; close other programs, or choose a smaller model"
    return "cannot be read: it is being replaced, or is damaged; try again (the server's log says more)"
