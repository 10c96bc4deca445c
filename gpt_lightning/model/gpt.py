"""The book's ``GPTModel``: the same function and the same random numbers, on torch's fast kernels.

Shapes: B batch, T tokens, C ``emb_dim``, H heads, D = C / H, V ``vocab_size``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.kv_cache import KVCache


class QKVProjection(nn.Linear):
    """Query, key and value projections in one matrix: ``(B, T, C)`` → ``(B, T, 3C)``.

    Initial weights are drawn as the book draws them, one projection after the other, weight before
    bias; so a seed gives the weights that it gives in the book.
    """

    def __init__(self, emb_dim: int, bias: bool) -> None:
        super().__init__(emb_dim, 3 * emb_dim, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.in_features)
        for third in range(3):
            nn.init.kaiming_uniform_(self.weight.chunk(3)[third], a=math.sqrt(5))
            if self.bias is not None:
                nn.init.uniform_(self.bias.chunk(3)[third], -bound, bound)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads = config.n_heads
        self.drop_rate = config.attention_drop_rate
        self.qkv = QKVProjection(config.emb_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(
        self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """``(B, T, C)`` → ``(B, T, C)``; with a cache the T tokens follow those it holds.

        ``mask`` says who sees whom, ``(B or 1, 1, T, length + T)``; without it the tokens see what came
        before them and themselves.
        """
        B, T, C = x.shape
        # (B, T, 3C) → three times (B, H, T, D)
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, C // self.n_heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        drop_rate = self.drop_rate if self.training else 0.0
        if mask is None and self.training and _products_are_faster(q):
            y = causal_attention_by_products(q, k, v, drop_rate)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=drop_rate, is_causal=mask is None and T > 1
            )
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C))


def _products_are_faster(q: Tensor) -> bool:
    """Than torch's fused kernel, forward and backward, and where the weights' memory is small."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= 512


def causal_attention_by_products(q: Tensor, k: Tensor, v: Tensor, drop_rate: float) -> Tensor:
    """``scaled_dot_product_attention`` as two products around a softmax: ``(B, H, T, D)`` each.

    On a CPU that multiplies bfloat16 in hardware it takes a third to half the time of the fused kernel, which
    converts to float32 block by block. It holds the weights, ``(B, H, T, T)``.
    """
    B, H, T, D = q.shape
    unseen = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(
        unseen.expand(B * H, T, T),
        q.reshape(B * H, T, D),
        k.reshape(B * H, T, D).transpose(1, 2),
        alpha=D**-0.5,
    )
    weights = F.dropout(scores.softmax(dim=-1), drop_rate)
    return (weights @ v.reshape(B * H, T, D)).view(B, H, T, D)


class FeedForward(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(config.emb_dim, 4 * config.emb_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.emb_dim, config.emb_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TransformerBlock(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.att = CausalSelfAttention(config, layer)
        self.ff = FeedForward(config)
        self.norm1 = nn.LayerNorm(config.emb_dim)
        self.norm2 = nn.LayerNorm(config.emb_dim)
        self.drop_shortcut = nn.Dropout(config.drop_rate)

    def forward(
        self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        x = x + self.drop_shortcut(self.att(self.norm1(x), cache, mask))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """Token ids to logits.

    Attributes:
        activation_checkpointing: Whether training keeps each block's input alone and computes the rest again in
            the backward pass: a third more work for a fraction of the memory, with the same result.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.embedding_drop_rate)
        self.trf_blocks = nn.ModuleList(
            TransformerBlock(config, layer) for layer in range(config.n_layers)
        )
        self.final_norm = nn.LayerNorm(config.emb_dim)
        self.out_head: nn.Module | None = (
            None
            if config.tied_embeddings
            else nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        )
        if config.tied_embeddings:
            self._initialise_as_gpt2()

    def _initialise_as_gpt2(self) -> None:
        """Normal(0, 0.02), biases 0, and what feeds a shortcut narrower by √(2·n_layers) (GPT-2, 2.3)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("out_proj.weight", "ff.layers.2.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layers))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def features(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        padding: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Token ids ``(B, T)`` → the last block's normalised output ``(B, T, C)``.

        With a cache the T tokens take the positions after those it holds, and are added to it.

        Args:
            padding: ``(B,)``, how many columns at the left of each row, counted from the cache's first,
                are no tokens. They change nothing: nobody sees them, and positions begin after them.
            documents: ``(B, T)``, the same number for the tokens of the same document, which follow one another.
                Each is computed as it would be alone: it sees no other, and its positions begin at 0.
                Attention then goes through a mask, without its fastest kernels. Not with a cache or padding.

        Raises:
            ValueError: More positions than ``context_length``.
        """
        assert documents is None or (cache is None and padding is None)
        start = 0 if cache is None else cache.length
        end = start + idx.shape[1]
        if end > self.config.context_length:
            raise ValueError(
                f"{end} tokens do not fit a context_length of {self.config.context_length}"
            )
        columns = torch.arange(end, device=idx.device)
        positions = columns[start:]
        mask = None
        if padding is not None:
            seen = (columns <= positions[:, None]) & (columns >= padding[:, None, None])
            itself = columns == positions[:, None]  # a padding column sees itself, not nothing
            mask = (seen | itself)[:, None]  # (B, 1, T, length + T)
            positions = (positions - padding[:, None]).clamp(min=0)
        elif documents is not None:
            begins = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
            same = documents[:, :, None] == documents[:, None, :]
            mask = (same & (columns <= columns[:, None]))[:, None]  # (B, 1, T, T)
            positions = columns - torch.where(begins, columns, 0).cummax(dim=1).values
        elif start and end - start > 1:
            mask = columns <= positions[:, None]  # (T, length + T)
        x = self.drop_emb(self.tok_emb(idx) + self.pos_emb(positions))
        for block in self.trf_blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, cache, mask, use_reentrant=False)
            else:
                x = block(x, cache, mask)
        if cache is not None:
            cache.length = end
        return self.final_norm(x)

    def head(self, features: Tensor) -> Tensor:
        """Features ``(..., C)`` → logits ``(..., V)``."""
        if self.out_head is None:
            return F.linear(features, self.tok_emb.weight)
        return self.out_head(features)

    @property
    def head_weight(self) -> Tensor:
        """``(V, C)``, whose product with the features are the logits."""
        if self.out_head is None:
            return self.tok_emb.weight
        assert isinstance(self.out_head, nn.Linear)
        return self.out_head.weight

    def forward(
        self, idx: Tensor, cache: KVCache | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Token ids ``(B, T)`` → logits ``(B, T, V)`` of each position's next token."""
        return self.head(self.features(idx, cache, documents=documents))
