"""Batches of windows, in an order that can be resumed at any batch.

L is the window length, B the windows of a batch.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gpt_lightning.data.dataset import ConcatWindowDataset, WindowDataset
from gpt_lightning.data.sampler import (
    MAX_IN_MEMORY,
    FeistelPermutation,
    Indices,
    MixtureSampler,
    Permutation,
    seed_from,
    sequential,
    shuffled,
)
from gpt_lightning.data.tokenizer import GPT2

Rng = Literal["step", "global"]
Batch = tuple[Tensor, ...]  # inputs, targets and, with a document mask, documents

_INDICES_PER_CALL = 4096  # that are computed together
_TOKENS_PER_READ = 4096  # or a batch's, if those are more


class ResumableDataLoader:
    """Data loader whose position can be saved and restored at any batch: ``(inputs, targets)``, each ``(B, L)``.

    It is not a ``DataLoader``: Lightning replaces the sampler of a ``DataLoader``, and starts a new permutation
    when a run resumes. With ``rng="step"`` the order of an epoch is a pure function of ``(seed, epoch)``; for
    more than a million windows it is computed batch by batch. With ``rng="global"`` an epoch draws two numbers
    on torch's global generator, as a ``DataLoader`` does (a base seed and the sampler's), and so has the book's
    order.

    A batch is counted before it is yielded, so a checkpoint that is written while the batch is trained on
    counts it as seen. All ranks get the same number of batches; a rank that has nothing in a short last batch
    gets ``(0, L)``.

    Args:
        windows: The dataset.
        batch_size: Windows of a batch on this rank.
        shuffle: Whether each epoch has another random order; else it is 0, 1, 2, …
        drop_last: Whether a last batch that is shorter than the others is left out.
        accumulate: Batches of an optimizer step. An epoch resumes only between two steps.
        whole_steps: Whether a last step of fewer batches is left out too.
        max_batches: Batches after which an epoch ends (Lightning's ``limit_train_batches``). ``None``: all. ``len``
            ignores it.
        num_workers: Threads that read batches ahead. 0: batches are read when they are needed, several small
            ones together. The batches are the same.
        pin_memory: Whether batches are in pinned memory, from which a GPU copies while it computes.
        documents: Whether a batch has a third tensor ``(B, L)``, with the same number for tokens of the same
            document. A document begins with its delimiter, ``end_of_text_id``.
        mixture: Sampler for a dataset of several texts. Its stream continues from one epoch to the next.
        rank: Which slice of each ``world_size * batch_size`` windows this process takes.

    Attributes:
        handed_out: ``(B,)``, indices of the windows of the last batch.
        seconds_waited: Total time spent waiting for batches that were not read yet.
    """

    def __init__(
        self,
        windows: WindowDataset | ConcatWindowDataset,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        accumulate: int = 1,
        whole_steps: bool = False,
        max_batches: int | None = None,
        seed: int = 0,
        rng: Rng = "step",
        num_workers: int = 0,
        pin_memory: bool = False,
        documents: bool = False,
        end_of_text_id: int = GPT2.end_of_text_id,
        mixture: MixtureSampler | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.windows = windows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.accumulate = accumulate
        self.whole_steps = whole_steps
        self.max_batches = max_batches
        self.seed = seed
        self.rng = rng
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.documents = documents
        self.end_of_text_id = end_of_text_id
        self.mixture = mixture if shuffle else None
        self.rank = rank
        self.world_size = world_size
        self.handed_out = np.empty(0, dtype=np.int64)
        self.seconds_waited = 0.0
        self._epoch = -1
        self._batches = 0
        self._order_seed = 0
        self._in_memory = True  # the permutation
        self._epoch_start = 0  # its position in the mixture's stream
        self._resuming = False

    @property
    def windows_per_batch(self) -> int:
        """Windows of a batch on all ranks together."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        complete, rest = divmod(len(self.windows), self.windows_per_batch)
        if self.whole_steps:
            return complete - complete % self.accumulate
        return complete + bool(rest and not self.drop_last)

    @property
    def batches(self) -> int:
        """Batches of an epoch, at most ``max_batches``."""
        return len(self) if self.max_batches is None else min(self.max_batches, len(self))

    def __iter__(self) -> Iterator[Batch]:
        if not (self._resuming and self._batches < self.batches):
            self._begin_epoch()
        self._resuming = False
        batches = range(self._batches, self.batches)
        reader = self._read_ahead(self._indices(self._permutation(), batches))
        while True:
            start = time.perf_counter()
            read = next(reader, None)
            self.seconds_waited += time.perf_counter() - start
            if read is None:
                return
            self._batches += 1
            self.handed_out, batch = read
            yield batch

    def _begin_epoch(self) -> None:
        self._epoch_start += self._batches * self.windows_per_batch
        self._epoch += 1
        self._batches = 0
        self._in_memory = self.rng == "global" or len(self.windows) <= MAX_IN_MEMORY
        if self.rng == "global":
            _draw_from_global_generator()  # the base seed, which a DataLoader draws for its workers
            self._order_seed = _draw_from_global_generator() if self.shuffle else 0
        else:
            self._order_seed = seed_from(self.seed, self._epoch)

    def _permutation(self) -> Permutation:
        if not self.shuffle:
            return sequential
        if (mixture := self.mixture) is not None:
            epoch_start = self._epoch_start
            return lambda positions: mixture(epoch_start + positions)
        if self._in_memory:
            return shuffled(len(self.windows), self._order_seed)
        return FeistelPermutation(len(self.windows), self._order_seed)

    def _indices(self, permutation: Permutation, batches: range) -> Iterator[Indices]:
        """Indices of the windows of each batch."""
        per_call = max(1, _INDICES_PER_CALL // self.batch_size)
        of_rank = self.rank * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        for first in range(batches.start, batches.stop, per_call):
            last = min(first + per_call, batches.stop)
            batch_indices = np.arange(first, last, dtype=np.int64)
            positions = batch_indices[:, None] * self.windows_per_batch + of_rank
            exists = positions < len(self.windows)
            if exists.all():
                yield from permutation(positions.ravel()).reshape(positions.shape)
                continue
            for row, mask in zip(positions, exists, strict=True):
                yield permutation(row[mask])

    def _read_ahead(self, indices: Iterator[Indices]) -> Iterator[tuple[Indices, Batch]]:
        """Each batch, with the indices of its windows."""
        if not self.num_workers:
            tokens = self.batch_size * self.windows.shape[1]
            while of_batches := list(islice(indices, max(1, _TOKENS_PER_READ // tokens))):
                yield from self._read(of_batches)
            return
        with ThreadPoolExecutor(self.num_workers) as workers:
            ahead: deque[Future[list[tuple[Indices, Batch]]]] = deque()
            for of_batch in indices:
                ahead.append(workers.submit(self._read, [of_batch]))
                if len(ahead) > 2 * self.num_workers:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()

    def _read(self, of_batches: list[Indices]) -> list[tuple[Indices, Batch]]:
        ids = torch.from_numpy(self.windows.read(np.concatenate(of_batches)))
        parts = ids.split([len(indices) for indices in of_batches])
        return list(zip(of_batches, map(self._batch, parts), strict=True))

    def _batch(self, ids: Tensor) -> Batch:
        inputs, targets = self._pinned(ids[:, :-1]), self._pinned(ids[:, 1:])
        if not self.documents:
            return inputs, targets
        documents = (inputs == self.end_of_text_id).cumsum(dim=1)
        return inputs, targets, self._pinned(documents)

    def _pinned(self, batch: Tensor) -> Tensor:
        # a tensor that is not contiguous would be copied through memory that is not pinned
        return batch.contiguous().pin_memory() if self.pin_memory else batch

    def state_dict(self) -> dict[str, Any]:
        """The position, in windows: it is valid for another batch size or number of ranks too."""
        state = {
            "epoch": self._epoch,
            "windows_seen": self._batches * self.windows_per_batch,
            "order_seed": self._order_seed,
            "order_in_memory": self._in_memory,
        }
        if self.mixture is not None:
            state["began_at"] = self._epoch_start
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at a saved position in the same windows, which ``TextDataModule`` verifies.

        Raises:
            ValueError: It is not between two optimizer steps of this size.
        """
        seen = state["windows_seen"]
        batches, rest = divmod(seen, self.windows_per_batch)
        if rest:
            raise ValueError(
                f"data.batch_size: the run was cut after {seen} windows of an epoch, which is not a multiple of "
                f"{self.windows_per_batch} windows per batch; give a divisor of {seen}"
            )
        if batches % self.accumulate and batches < self.batches:
            raise ValueError(
                f"data.global_batch_size: the run was cut after {seen} windows of an epoch, which is not a multiple "
                f"of {self.windows_per_batch * self.accumulate} windows per optimizer step; resume with as many "
                "per step as it had"
            )
        self._epoch = state["epoch"]
        self._batches = batches
        self._order_seed = state["order_seed"]
        # checkpoints of earlier versions do not have all keys
        self._in_memory = state.get("order_in_memory", True)
        self._epoch_start = state.get("began_at", 0)
        self._resuming = True


def _draw_from_global_generator() -> int:
    return int(torch.empty((), dtype=torch.int64).random_().item())
