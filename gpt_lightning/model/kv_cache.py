"""Keys and values of the tokens read so far. The caller owns them, so the model stays stateless."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpt_lightning.model.config import GPTConfig


@dataclass
class KVCache:
    """Preallocated keys and values of every block, of which the first ``length`` positions are filled.

    Attributes:
        keys: Of each block ``(B, n_heads, T_max, emb_dim / n_heads)``. Memory of its own for each, for a compiler
            would write anew what they shared.
        values: As ``keys``.
        length: Positions filled; :class:`~gpt_lightning.model.gpt.GPTModel` advances it.
        at: ``(1,)``, where the next token goes, on the device; none: at ``length``. With it nothing in a step
            depends on a number of Python's, as a CUDA graph needs, and ``width`` positions are handed out,
            filled or not: a mask must hide the others.
        width: See ``at``.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0
    at: Tensor | None = None
    width: int = 0

    @classmethod
    def allocate(
        cls,
        config: GPTConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "KVCache":
        """An empty cache for ``max_length`` positions, of which no more than the context are kept."""
        head_dim = config.emb_dim // config.n_heads
        max_length = min(max_length, config.context_length)
        shape = (batch_size, config.n_heads, max_length, head_dim)

        def empty() -> list[Tensor]:
            return [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]

        return cls(empty(), empty())

    @property
    def max_length(self) -> int:
        return self.keys[0].shape[2]

    def repeat(self, times: int) -> "KVCache":
        """A cache with each row of the batch ``times`` times, one after the other."""
        return KVCache(
            [keys.repeat_interleave(times, dim=0) for keys in self.keys],
            [values.repeat_interleave(times, dim=0) for values in self.values],
            self.length,
        )

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one block's ``(B, H, T, D)`` after ``length``; return all its ``(B, H, length + T, D)``.

        ``length`` itself moves only when every block has stored its part. Where ``at`` is given, T is 1, and
        what returns is ``(B, H, width, D)``.
        """
        own = self.keys[layer], self.values[layer]
        if self.at is not None:
            for mine, new in zip(own, (keys, values), strict=True):
                mine.index_copy_(2, self.at, new.to(mine.dtype))
            return own[0][:, :, : self.width], own[1][:, :, : self.width]
        end = self.length + keys.shape[2]
        assert end <= self.max_length, f"{end} positions do not fit a cache of {self.max_length}"
        own[0][:, :, self.length : end] = keys
        own[1][:, :, self.length : end] = values
        return own[0][:, :, :end], own[1][:, :, :end]
