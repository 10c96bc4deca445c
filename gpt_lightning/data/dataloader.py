"""Batches of windows, in an order that a run can go on with anywhere.

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
from gpt_lightning.data.tokenizer import END_OF_TEXT_ID

Rng = Literal["step", "global"]
Batch = tuple[Tensor, ...]  # inputs, targets, and where documents are kept apart, documents

_AT_A_TIME = 4096  # windows whose order is computed at once
_READ_AT_ONCE = 4096  # tokens, or a batch's if those are more


class ResumableDataLoader:
    """Batches ``(inputs, targets)``, each ``(B, L)``, in an order that can be resumed anywhere.

    It is no ``DataLoader``: Lightning would replace that one's sampler, and restarts it at the head of a
    new permutation when a run resumes. With ``rng="step"`` the order of an epoch is a pure function of
    ``(seed, epoch)``, computed where it is asked for if there are more than a million windows. With
    ``rng="global"`` a pass draws on torch's global generator the two numbers that a ``DataLoader`` draws, a
    base seed and the sampler's, and so sees the book's order.

    A batch is counted before it is handed out, so a checkpoint written while it is worked on says that
    it was seen. All ranks get as many batches; where a short last one leaves a rank nothing, it is ``(0, L)``.

    Args:
        windows: What is drawn from.
        batch_size: Windows a batch on this rank.
        shuffle: Whether each pass has an order of its own, else it is 0, 1, 2, …
        drop_last: Whether a last batch shorter than the others is left out.
        accumulate: Batches an update, between which alone a pass can be gone on with.
        whole_updates: Whether a last update of fewer batches is left out too.
        max_batches: Where a pass ends that is to be cut short (Lightning's ``limit_train_batches``); none:
            with the last batch. ``len`` does not know it.
        num_workers: Threads that read batches ahead; with none they are read when they are asked for,
            small ones several at a time. The batches are the same.
        pin_memory: Whether they are put where a GPU can copy them from while it computes.
        documents: Whether a batch has a third tensor ``(B, L)``, the same number for the same document. A
            document begins with its ``<|endoftext|>``.
        mixture: The order, if the windows are of several sources. It goes on from one pass to the next.
        rank: Which slice of each ``world_size * batch_size`` windows this process takes.

    Attributes:
        handed_out: ``(B,)``, the numbers of the last batch's windows.
        seconds_waited: For batches that were not there yet, in all.
    """

    def __init__(
        self,
        windows: WindowDataset | ConcatWindowDataset,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        accumulate: int = 1,
        whole_updates: bool = False,
        max_batches: int | None = None,
        seed: int = 0,
        rng: Rng = "step",
        num_workers: int = 0,
        pin_memory: bool = False,
        documents: bool = False,
        mixture: MixtureSampler | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.windows = windows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.accumulate = accumulate
        self.whole_updates = whole_updates
        self.max_batches = max_batches
        self.seed = seed
        self.rng = rng
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.documents = documents
        self.mixture = mixture if shuffle else None
        self.rank = rank
        self.world_size = world_size
        self.handed_out = np.empty(0, dtype=np.int64)
        self.seconds_waited = 0.0
        self._epoch = -1
        self._batches = 0
        self._order_seed = 0
        self._in_memory = True  # the order
        self._began_at = 0  # where in the mixture's stream
        self._resuming = False

    @property
    def windows_at_a_time(self) -> int:
        """On all ranks together."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        whole, rest = divmod(len(self.windows), self.windows_at_a_time)
        if self.whole_updates:
            return whole - whole % self.accumulate
        return whole + bool(rest and not self.drop_last)

    @property
    def batches(self) -> int:
        """Of a pass; ``max_batches`` cuts it short."""
        return len(self) if self.max_batches is None else min(self.max_batches, len(self))

    def __iter__(self) -> Iterator[Batch]:
        if not (self._resuming and self._batches < self.batches):
            self._begin_epoch()
        self._resuming = False
        batches = range(self._batches, self.batches)
        reader = self._read_ahead(self._numbers(self._order(), batches))
        while True:
            asked = time.perf_counter()
            read = next(reader, None)
            self.seconds_waited += time.perf_counter() - asked
            if read is None:
                return
            self._batches += 1
            self.handed_out, batch = read
            yield batch

    def _begin_epoch(self) -> None:
        self._began_at += self._batches * self.windows_at_a_time
        self._epoch += 1
        self._batches = 0
        self._in_memory = self.rng == "global" or len(self.windows) <= MAX_IN_MEMORY
        if self.rng == "global":
            _draw_from_global_generator()  # the base seed, which a DataLoader draws for its workers
            self._order_seed = _draw_from_global_generator() if self.shuffle else 0
        else:
            self._order_seed = seed_from(self.seed, self._epoch)

    def _order(self) -> Permutation:
        if not self.shuffle:
            return sequential
        if (mixture := self.mixture) is not None:
            began_at = self._began_at
            return lambda places: mixture(began_at + places)
        if self._in_memory:
            return shuffled(len(self.windows), self._order_seed)
        return FeistelPermutation(len(self.windows), self._order_seed)

    def _numbers(self, order: Permutation, batches: range) -> Iterator[Indices]:
        """The numbers of each batch's windows."""
        at_a_time = max(1, _AT_A_TIME // self.batch_size)
        mine = self.rank * self.batch_size + np.arange(self.batch_size)
        for first in range(batches.start, batches.stop, at_a_time):
            some = np.arange(first, min(first + at_a_time, batches.stop))
            places = some[:, None] * self.windows_at_a_time + mine
            there = places < len(self.windows)
            if there.all():
                yield from order(places.ravel()).reshape(places.shape)
                continue
            for row, kept in zip(places, there, strict=True):
                yield order(row[kept])

    def _read_ahead(self, numbers: Iterator[Indices]) -> Iterator[tuple[Indices, Batch]]:
        """Each batch's window numbers, and the batch."""
        if not self.num_workers:
            tokens = self.batch_size * self.windows.shape[1]
            while several := list(islice(numbers, max(1, _READ_AT_ONCE // tokens))):
                yield from self._read(several)
            return
        with ThreadPoolExecutor(self.num_workers) as workers:
            ahead: deque[Future[list[tuple[Indices, Batch]]]] = deque()
            for of_batch in numbers:
                ahead.append(workers.submit(self._read, [of_batch]))
                if len(ahead) > 2 * self.num_workers:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()

    def _read(self, of_batches: list[Indices]) -> list[tuple[Indices, Batch]]:
        ids = torch.from_numpy(self.windows.draw(np.concatenate(of_batches)))
        parts = ids.split([len(numbers) for numbers in of_batches])
        return list(zip(of_batches, map(self._batch, parts), strict=True))

    def _batch(self, ids: Tensor) -> Batch:
        inputs, targets = self._pinned(ids[:, :-1]), self._pinned(ids[:, 1:])
        if not self.documents:
            return inputs, targets
        documents = (inputs == END_OF_TEXT_ID).cumsum(dim=1)
        return inputs, targets, self._pinned(documents)

    def _pinned(self, batch: Tensor) -> Tensor:
        # what is not contiguous would be copied to memory that is not pinned, on its way
        return batch.contiguous().pin_memory() if self.pin_memory else batch

    def state_dict(self) -> dict[str, Any]:
        """The position in windows, so that it holds for another batch size or number of ranks too."""
        state = {
            "epoch": self._epoch,
            "windows_seen": self._batches * self.windows_at_a_time,
            "order_seed": self._order_seed,
            "order_in_memory": self._in_memory,
        }
        if self.mixture is not None:
            state["began_at"] = self._began_at
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved position in the same windows, which ``TextDataModule`` verifies.

        Raises:
            ValueError: It is not between two updates of this size.
        """
        seen = state["windows_seen"]
        batches, rest = divmod(seen, self.windows_at_a_time)
        if rest:
            raise ValueError(
                f"data.batch_size: the run was cut after {seen} windows of an epoch, "
                f"which batches of {self.windows_at_a_time} do not meet; give a divisor of it"
            )
        if batches % self.accumulate and batches < self.batches:
            raise ValueError(
                f"data.global_batch_size: the run was cut after {seen} windows of an epoch, which updates of "
                f"{self.windows_at_a_time * self.accumulate} do not meet; resume with as many an update "
                "as it had"
            )
        self._epoch = state["epoch"]
        self._batches = batches
        self._order_seed = state["order_seed"]
        self._in_memory = state.get(
            "order_in_memory", True
        )  # as all were, before there was a choice
        self._began_at = state.get("began_at", 0)
        self._resuming = True


def _draw_from_global_generator() -> int:
    return int(torch.empty((), dtype=torch.int64).random_().item())
