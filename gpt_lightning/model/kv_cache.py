"""Keys and values of the tokens read so far. The caller owns them, so the model stays stateless."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpt_lightning.model.config import GPTConfig


@dataclass
class KVCache:
    """Preallocated keys and values of every block, of which the first ``length`` positions are filled.

    Attributes:
        keys: ``(n_layers, B, n_heads, T_max, emb_dim / n_heads)``.
        values: As ``keys``.
        length: Positions filled; :class:`~gpt_lightning.model.gpt.GPTModel` advances it.
        at: ``(1,)``, where the next token goes, on the device; none: at ``length``. With it nothing in a step
            depends on a number of Python's, as a CUDA graph needs, and ``width`` positions are handed out,
            filled or not: a mask must hide the others.
        width: See ``at``.
    """

    keys: Tensor
    values: Tensor
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
        shape = (config.n_layers, batch_size, config.n_heads, max_length, head_dim)
        return cls(
            torch.empty(shape, device=device, dtype=dtype),
            torch.empty(shape, device=device, dtype=dtype),
        )

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    def repeat(self, times: int) -> "KVCache":
        """A cache with each row of the batch ``times`` times, one after the other."""
        return KVCache(
            self.keys.repeat_interleave(times, dim=1),
            self.values.repeat_interleave(times, dim=1),
            self.length,
        )

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one block's ``(B, H, T, D)`` after ``length``; return all its ``(B, H, length + T, D)``.

        ``length`` itself moves only when every block has stored its part. Where ``at`` is given, T is 1, and
        what returns is ``(B, H, width, D)``.
        """
        if self.at is not None:
            self.keys[layer].index_copy_(2, self.at, keys.to(self.keys.dtype))
            self.values[layer].index_copy_(2, self.at, values.to(self.values.dtype))
            return self.keys[layer, :, :, : self.width], self.values[layer, :, :, : self.width]
        end = self.length + keys.shape[2]
        assert end <= self.max_length, f"{end} positions do not fit a cache of {self.max_length}"
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
