"""GPT-2 style language model: the book's ``GPTModel``, implemented with PyTorch's fast kernels.

The same seed gives the same initial weights, the same logits and the same dropout as in the book.

Shapes: B batch size, T tokens, C ``emb_dim``, H ``n_heads``, D = C / H, V ``vocab_size``.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.cpu_attention import causal_attention_by_products, products_are_faster
from gpt_lightning.model.kv_cache import KVCache


class QKVProjection(nn.Linear):
    """Query, key and value projections in one matrix: ``(B, T, C)`` → ``(B, T, 3C)``.

    The weights are initialized in the book's order: query, key, value, and of each the weight before
    the bias. So a seed gives the same weights as the book's three separate layers.
    """

    def __init__(self, emb_dim: int, bias: bool) -> None:
        super().__init__(emb_dim, 3 * emb_dim, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.in_features)
        for i in range(3):  # query, key, value
            nn.init.kaiming_uniform_(self.weight.chunk(3)[i], a=math.sqrt(5))
            if self.bias is not None:
                nn.init.uniform_(self.bias.chunk(3)[i], -bound, bound)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention with a causal mask."""

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
        """``(B, T, C)`` → ``(B, T, C)``.

        Args:
            cache: Keys and values of the previous tokens. Those of the T new tokens are appended.
            mask: Broadcasts to ``(B, 1, T, length + T)``, where ``length`` is the number of cached tokens.
                True, or 0 if it is a float mask, where a query (row) attends to a key (column). ``None``:
                each token attends to itself and to all tokens before it.
        """
        B, T, C = x.shape
        # (B, T, 3C) → q, k and v, each (B, H, T, D)
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, C // self.n_heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        drop_rate = self.drop_rate if self.training else 0.0
        if mask is None and self.training and products_are_faster(q, drop_rate):
            y = causal_attention_by_products(q, k, v, drop_rate)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=drop_rate, is_causal=mask is None and T > 1
            )
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them: ``(B, T, C)`` → ``(B, T, 4C)`` → ``(B, T, C)``."""

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
    """Attention and feed-forward network, each with LayerNorm before it and a shortcut around it."""

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
        """``(B, T, C)`` → ``(B, T, C)``. For ``cache`` and ``mask`` see :class:`CausalSelfAttention`."""
        x = x + self.drop_shortcut(self.att(self.norm1(x), cache, mask))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """GPT language model: token ids ``(B, T)`` → logits ``(B, T, V)``.

    Args:
        config: Architecture; the book's dict, as ``GPT_CONFIG_124M``, is one too.

    Attributes:
        activation_checkpointing: Whether training keeps only the input of each block and recomputes the
            other activations in the backward pass. The result is the same; training needs a fraction of
            the memory and a third more computation.
    """

    def __init__(self, config: GPTConfig | Mapping[str, Any]) -> None:
        super().__init__()
        if not isinstance(config, GPTConfig):
            config = GPTConfig.from_dict(config)
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
            self._init_gpt2_weights()

    def _init_gpt2_weights(self) -> None:
        """GPT-2's initialization (section 2.3 of the paper): weights from N(0, 0.02), biases 0.

        The standard deviation of layers whose output is added to a shortcut is divided by √(2·n_layers).
        """
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
        """Token ids ``(B, T)`` → output of the final LayerNorm ``(B, T, C)``.

        Args:
            cache: Keys and values of the previous tokens. The T new tokens take the next positions, and
                their keys and values are appended.
            padding: ``(B,)``, number of padding columns at the left of each row, counted from the first
                cached token. Padding changes no result: no token attends to it, and positions start
                after it.
            documents: ``(B, T)``, document number of each token; tokens of one document are adjacent.
                Each document is computed as if it were alone: its tokens attend only to each other, and
                its positions start at 0. This needs an attention mask, which disables the fastest
                kernels. Not allowed together with ``cache`` or ``padding``.

        Raises:
            ValueError: There are more positions than ``context_length``.
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
            visible = (columns <= positions[:, None]) & (columns >= padding[:, None, None])
            # padding attends to itself: a softmax over nothing would be NaN
            is_self = columns == positions[:, None]
            mask = (visible | is_self)[:, None]  # (B, 1, T, length + T)
            positions = (positions - padding[:, None]).clamp(min=0)
        elif documents is not None:
            is_first_token = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
            same_document = documents[:, :, None] == documents[:, None, :]
            mask = (same_document & (columns <= columns[:, None]))[:, None]  # (B, 1, T, T)
            document_start = torch.where(is_first_token, columns, 0).cummax(dim=1).values
            positions = columns - document_start
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
        """Weight of the output head, ``(V, C)``: logits = features @ weight.T."""
        if self.out_head is None:
            return self.tok_emb.weight
        assert isinstance(self.out_head, nn.Linear)
        return self.out_head.weight

    def forward(
        self, idx: Tensor, cache: KVCache | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Token ids ``(B, T)`` → logits ``(B, T, V)`` of the next token at each position."""
        return self.head(self.features(idx, cache, documents=documents))


def has_hooks(model: nn.Module) -> bool:
    """Whether a module runs Python functions before or after its forward pass, as sharded weights need."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
