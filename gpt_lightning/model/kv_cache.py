"""Key/value cache for generation. The caller owns it, so the model stays stateless."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpt_lightning.model.config import GPTConfig


@dataclass
class KVCache:
    """Preallocated keys and values of every block. The first ``length`` positions are filled.

    Shapes: B batch, H heads, T new tokens, D = ``emb_dim`` / H.

    Attributes:
        keys: One tensor per block, ``(B, H, max_length, D)``. The tensors do not share memory: a compiler
            would copy shared memory as a whole when one block writes to it.
        values: Same shapes as ``keys``.
        length: Number of filled positions; :class:`~gpt_lightning.model.gpt.GPTModel` advances it.
        position: ``(1,)``, the position of the next token, as a tensor on the device; ``None``: the
            position is ``length``. With it no step depends on a Python number, as a CUDA graph
            requires. :meth:`append` then returns the first ``width`` positions, filled or not, and the
            caller must mask the unfilled ones.
        width: Number of positions that :meth:`append` returns if ``position`` is set.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0
    position: Tensor | None = None
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
        """An empty cache for ``max_length`` positions, but never for more than ``context_length``."""
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
        """A copy in which each row of the batch appears ``times`` times in succession."""
        return KVCache(
            [keys.repeat_interleave(times, dim=0) for keys in self.keys],
            [values.repeat_interleave(times, dim=0) for values in self.values],
            self.length,
        )

    def select(self, rows: Tensor, max_length: int) -> "KVCache":
        """A copy with these rows, which may repeat, and with room for ``max_length`` positions.

        Args:
            rows: Indices, ``(R,)``.
        """
        return KVCache(
            [keys[:, :, :max_length].index_select(0, rows) for keys in self.keys],
            [values[:, :, :max_length].index_select(0, rows) for values in self.values],
            self.length,
        )

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values ``(B, H, T, D)`` of one block; return all ``(B, H, length + T, D)``.

        ``length`` does not change: the model advances it after the last block. If ``position`` is set, T must
        be 1 and the returned shape is ``(B, H, width, D)``.
        """
        cached_keys, cached_values = self.keys[layer], self.values[layer]
        if self.position is not None:
            cached_keys.index_copy_(2, self.position, keys.to(cached_keys.dtype))
            cached_values.index_copy_(2, self.position, values.to(cached_values.dtype))
            return cached_keys[:, :, : self.width], cached_values[:, :, : self.width]
        end = self.length + keys.shape[2]
        assert end <= self.max_length, f"{end} positions do not fit a cache of {self.max_length}"
        cached_keys[:, :, self.length : end] = keys
        cached_values[:, :, self.length : end] = values
        return cached_keys[:, :, :end], cached_values[:, :, :end]
