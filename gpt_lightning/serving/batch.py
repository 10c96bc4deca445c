"""Rows of different requests that share decoding steps. A row joins and leaves between two steps.

All rows end at the same column of one KV cache and are padded at the left, as the prompts of
:func:`gpt_lightning.generation.engine.stream_ids` are. A row that joins is computed alone or with the other new rows,
and its keys and values are copied into a free slot.

Shapes: R rows, T tokens, C ``emb_dim``, V ``vocab_size``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar, final

import torch
from torch import Tensor

from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.kv_cache import KVCache

MIN_UNUSED_COLUMNS = 64  # fewer columns that no row uses are not worth a copy of the cache


@dataclass(eq=False)
class DecodedRow:
    """One text that is continued.

    Attributes:
        ids: Token ids of the prompt and of the continuation.
        max_length: Number of ids at which the text ends.
        padding: Columns at the left of the shared cache that do not belong to the row.
    """

    ids: list[int]
    max_length: int
    padding: int = field(default=0, init=False)

    @property
    def num_remaining(self) -> int:
        """How many tokens may follow."""
        return self.max_length - len(self.ids)


Row = TypeVar("Row", bound=DecodedRow)


@final
class DecodeBatch(Generic[Row]):
    """Rows that one decoding step continues together."""

    def __init__(self, model: GPTModel) -> None:
        self.model = model
        self._cached: list[Row] = []  # row i uses slot i of the cache
        self._sliding: list[Row] = []  # rows longer than the context have no cache
        self._cache = KVCache.allocate(model.config, 0, 0)
        self._view: KVCache | None = None  # the slots in use
        self._padding: Tensor | None = None

    @property
    def rows(self) -> list[Row]:
        return self._cached + self._sliding

    def add(self, rows: Sequence[Row]) -> Tensor:
        """Compute the prompts of new rows. Returns features ``(R, T, C)``.

        Rows that may have more than one token then take part in the steps. T is the length of the longest prompt, or ``context_length`` if that is shorter: then the prompt is cropped
        from the left. The features of shorter prompts are at the right. Rows with equal prompts are computed once.

        Raises:
            RuntimeError, MemoryError: There is no memory for the rows; the batch is as it was.
        """
        config, weight = self.model.config, self.model.tok_emb.weight
        windows = [row.ids[-config.context_length :] for row in rows]
        distinct = {tuple(window): i for i, window in reversed(list(enumerate(windows)))}
        first = sorted(distinct.values())
        place = {tuple(windows[i]): number for number, i in enumerate(first)}
        index = [place[tuple(window)] for window in windows]
        width = max(map(len, windows))
        padding = [width - len(windows[i]) for i in first]
        ids = torch.tensor(
            [[0] * (width - len(windows[i])) + windows[i] for i in first], device=weight.device
        )
        new = KVCache.allocate(config, len(first), width, weight.device, weight.dtype)
        padding_tensor = torch.tensor(padding, device=weight.device) if any(padding) else None
        features = self.model.features(ids, new, padding_tensor)
        if index != list(range(len(first))):
            features = features[index]
        staying = [i for i, row in enumerate(rows) if row.num_remaining > 1]
        joining = [i for i in staying if len(rows[i].ids) < config.context_length]
        self._join(
            new,
            [index[i] for i in joining],
            [rows[i] for i in joining],
            [padding[index[i]] for i in joining],
        )
        self._sliding += [rows[i] for i in staying if i not in joining]
        return features

    def step(self) -> tuple[list[Row], Tensor]:
        """All rows, and the logits ``(R, V)`` of the token after the last id of each.

        The caller appends one id to every row, or removes the row, before the next step. If there is no memory for a
        step, it can be repeated with fewer rows.
        """
        self._move_full_rows()
        self._drop_unused_columns()
        logits = []
        if self._cached:
            if self._view is None:
                self._view = self._used_slots()
                padding = [row.padding for row in self._cached]
                device = self.model.tok_emb.weight.device
                self._padding = torch.tensor(padding, device=device) if any(padding) else None
            last = torch.tensor(
                [[row.ids[-1]] for row in self._cached], device=self.model.tok_emb.weight.device
            )
            features = self.model.features(last, self._view, self._padding)
            self._cache.length = self._view.length
            logits.append(self.model.head(features[:, -1]))
        if self._sliding:
            # learned position embeddings cannot be shifted: the complete window is computed
            context_length = self.model.config.context_length
            windows = torch.tensor(
                [row.ids[-context_length:] for row in self._sliding],
                device=self.model.tok_emb.weight.device,
            )
            logits.append(self.model.head(self.model.features(windows)[:, -1]))
        return self.rows, torch.cat(logits) if len(logits) > 1 else logits[0]

    def remove(self, row: Row) -> None:
        """Free the slot of ``row``, if it has one; the last row moves into it."""
        if row in self._sliding:
            self._sliding.remove(row)
        if row not in self._cached:
            return
        slot, length = self._cached.index(row), self._cache.length
        last = self._cached.pop()
        if last is not row:
            for tensor in (*self._cache.keys, *self._cache.values):
                tensor[slot, :, :length] = tensor[len(self._cached), :, :length]
            self._cached[slot] = last
        self._view = None
        if not self._cached:
            self._cache.length = 0

    def _join(self, new: KVCache, index: list[int], rows: list[Row], padding: list[int]) -> None:
        """Copy the keys and values of rows ``index`` of ``new`` into free slots."""
        if not rows:
            return
        end = max(self._cache.length, new.length)
        remaining = max(row.num_remaining for row in (*self._cached, *rows))
        self._reserve(len(self._cached) + len(rows), end + remaining)
        self._shift(end - self._cache.length)
        self._cache.length = end
        start = end - new.length
        for source, row, columns in zip(index, rows, padding, strict=True):
            slot = len(self._cached)
            for target, values in zip(
                (*self._cache.keys, *self._cache.values), (*new.keys, *new.values), strict=True
            ):
                target[slot, :, :start] = 0.0  # padding is masked, but 0 × NaN would be NaN
                target[slot, :, start:end] = values[source, :, : new.length]
            row.padding = start + columns
            self._cached.append(row)
        self._view = None

    def _reserve(self, slots: int, width: int) -> None:
        """Enlarge the cache to at least ``slots`` rows of ``width`` positions, in few large steps."""
        width = min(width, self.model.config.context_length)
        old_slots, old_width = self._cache.keys[0].shape[0], self._cache.max_length
        if slots <= old_slots and width <= old_width:
            return
        slots = old_slots if slots <= old_slots else max(slots, 2 * old_slots)
        width = old_width if width <= old_width else max(width, 2 * old_width)
        weight, length = self.model.tok_emb.weight, self._cache.length
        larger = KVCache.allocate(self.model.config, slots, width, weight.device, weight.dtype)
        used = len(self._cached)
        for target, values in zip(
            (*larger.keys, *larger.values), (*self._cache.keys, *self._cache.values), strict=True
        ):
            target[:used, :, :length] = values[:used, :, :length]
        larger.length = length
        self._cache, self._view = larger, None

    def _shift(self, columns: int) -> None:
        """Move all cached rows ``columns`` to the right; negative: to the left."""
        if not columns or not self._cached:
            return
        length, used = self._cache.length, len(self._cached)
        start = max(0, -columns)  # what moves out at the left is padding
        # the only allocation: without memory nothing has moved
        moved = torch.empty_like(self._cache.keys[0][:used, :, start:length])
        for tensor in (*self._cache.keys, *self._cache.values):
            moved.copy_(tensor[:used, :, start:length])
            tensor[:used, :, start + columns : length + columns] = moved
            if columns > 0:
                tensor[:used, :, :columns] = 0.0
        for row in self._cached:
            row.padding += columns
        self._cache.length += columns
        self._view = None

    def _move_full_rows(self) -> None:
        """Rows that fill the context leave the cache."""
        context_length = self.model.config.context_length
        for row in [row for row in self._cached if len(row.ids) > context_length]:
            self.remove(row)
            self._sliding.append(row)

    def _drop_unused_columns(self) -> None:
        """Move the rows to the left if many columns have no row, or if there is no column left."""
        if not self._cached:
            return
        unused = min(row.padding for row in self._cached)
        is_full = self._cache.length == self._cache.max_length
        # a single row without padding takes the fastest kernels
        is_single = len(self._cached) == 1
        if is_full or is_single or unused >= max(MIN_UNUSED_COLUMNS, self._cache.length // 4):
            self._shift(-unused)

    def _used_slots(self) -> KVCache:
        used = len(self._cached)
        return KVCache(
            [keys[:used] for keys in self._cache.keys],
            [values[:used] for values in self._cache.values],
            self._cache.length,
        )
