"""Windows over one array of token ids, and the order in which a run sees them.

L is the window length (the model's ``context_length`` unless asked otherwise).
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rng = Literal["step", "global"]
Batch = tuple[Tensor, Tensor]


def windows(tokens: NDArray[np.uint16], length: int, stride: int) -> NDArray[np.uint16]:
    """All windows as one view ``(N, L + 1)`` into ``tokens``: nothing is copied.

    Window i starts at ``i * stride``; its inputs are the first L ids, its targets the last L. Like the
    book's dataset, the last start is the last that leaves a target for every input.
    """
    if len(tokens) <= length:
        return np.empty((0, length + 1), dtype=tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::stride]


def seed_from(*key: int) -> int:
    """A 63-bit seed that is a pure function of ``key``; any change in any part gives an unrelated one."""
    digest = blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class WindowLoader:
    """Batches ``(inputs, targets)``, each ``(B, L)``, in an order that can be resumed anywhere.

    It is no ``DataLoader``: Lightning would replace that one's sampler, and restarts it at the head of a
    new permutation when a run resumes. With ``rng="step"`` the order of an epoch is a pure function of
    ``(seed, epoch)``. With ``rng="global"`` a pass draws on torch's global generator the two numbers
    that a ``DataLoader`` draws, a base seed and the sampler's, and so sees the book's order.

    A batch is counted before it is handed out, so a checkpoint written while it is worked on says that
    it was seen. All ranks get as many batches; where a short last one leaves a rank nothing, it is ``(0, L)``.

    Args:
        windows: ``(N, L + 1)``, see :func:`windows`.
        batch_size: Windows a batch on this rank.
        shuffle: Whether each pass has an order of its own, else it is 0, 1, 2, …
        drop_last: Whether a last batch shorter than the others is left out.
        max_batches: Where a pass ends that is to be cut short (Lightning's ``limit_train_batches``); none:
            with the last batch. ``len`` does not know it.
        num_workers: Threads that read batches ahead; with none each is read when it is asked for. The
            batches are the same.
        pin_memory: Whether they are put where a GPU can copy them from while it computes.
        rank: Which slice of each global batch, ``world_size * batch_size`` windows, this process takes.

    Attributes:
        handed_out: ``(B,)``, the numbers of the last batch's windows.
        seconds_waited: For batches that were not there yet, in all.
    """

    def __init__(
        self,
        windows: NDArray[np.uint16],
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        max_batches: int | None = None,
        seed: int = 0,
        rng: Rng = "step",
        num_workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.windows = windows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.max_batches = max_batches
        self.seed = seed
        self.rng = rng
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.rank = rank
        self.world_size = world_size
        self.handed_out = np.empty(0, dtype=np.int64)
        self.seconds_waited = 0.0
        self._epoch = -1
        self._batches = 0
        self._order_seed = 0
        self._resuming = False

    @property
    def _global_batch(self) -> int:
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        whole, rest = divmod(len(self.windows), self._global_batch)
        return whole + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        end = len(self) if self.max_batches is None else min(self.max_batches, len(self))
        if not (self._resuming and self._batches < end):
            self._begin_epoch()
        self._resuming = False
        reader = self._read_ahead(self._order(), range(self._batches, end))
        while True:
            asked = time.perf_counter()
            read = next(reader, None)
            self.seconds_waited += time.perf_counter() - asked
            if read is None:
                return
            numbers, batch = read
            self._batches += 1
            self.handed_out = numbers
            yield batch

    def _begin_epoch(self) -> None:
        self._epoch += 1
        self._batches = 0
        if self.rng == "global":
            _draw_from_global_generator()  # the base seed, which a DataLoader draws for its workers
            self._order_seed = _draw_from_global_generator() if self.shuffle else 0
        else:
            self._order_seed = seed_from(self.seed, self._epoch)

    def _read_ahead(
        self, order: NDArray[np.int64], batches: range
    ) -> Iterator[tuple[NDArray[np.int64], Batch]]:
        """Each batch's window numbers, and the batch."""

        def read(batch: int) -> tuple[NDArray[np.int64], Batch]:
            start = batch * self._global_batch + self.rank * self.batch_size
            numbers = order[start : start + self.batch_size]
            ids = torch.from_numpy(self.windows[numbers].astype(np.int64))
            if self.pin_memory:
                ids = ids.pin_memory()
            return numbers, (ids[:, :-1], ids[:, 1:])

        if not self.num_workers:
            yield from map(read, batches)
            return
        with ThreadPoolExecutor(self.num_workers) as workers:
            ahead: deque[Future[tuple[NDArray[np.int64], Batch]]] = deque()
            for batch in batches:
                ahead.append(workers.submit(read, batch))
                if len(ahead) > 2 * self.num_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _order(self) -> NDArray[np.int64]:
        n = len(self.windows)
        if not self.shuffle:
            return np.arange(n)
        generator = torch.Generator().manual_seed(self._order_seed)
        return torch.randperm(n, generator=generator).numpy()

    def state_dict(self) -> dict[str, Any]:
        """The position in windows, so that it holds for another batch size or number of ranks too."""
        return {
            "epoch": self._epoch,
            "windows_seen": self._batches * self._global_batch,
            "order_seed": self._order_seed,
            "windows": list(self.windows.shape),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved position.

        Raises:
            ValueError: It is a position in other windows, or not between two batches of this size.
        """
        if state["windows"] != list(self.windows.shape):
            (n, width), (own, own_width) = state["windows"], self.windows.shape
            raise ValueError(
                f"data: the run has seen {n} windows of {width - 1} tokens, here are {own} of "
                f"{own_width - 1}; resume with the text, split and stride it had, or begin a new run "
                "with --init_from"
            )
        batches, rest = divmod(state["windows_seen"], self._global_batch)
        if rest:
            raise ValueError(
                f"data.batch_size: the run was cut after {state['windows_seen']} windows of an epoch, "
                f"which batches of {self._global_batch} do not meet; give a divisor of it"
            )
        self._epoch = state["epoch"]
        self._batches = batches
        self._order_seed = state["order_seed"]
        self._resuming = True


def _draw_from_global_generator() -> int:
    return int(torch.empty((), dtype=torch.int64).random_().item())
