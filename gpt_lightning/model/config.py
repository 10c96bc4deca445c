"""Model configuration under the book's names, and the four sizes of GPT-2."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from gpt_lightning.suggestions import suggest

DROP_RATES = ("drop_rate", "attn_drop_rate", "emb_drop_rate")


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of a GPT-2 style model, with the book's configuration keys.

    Args:
        vocab_size: Number of token ids; V in shapes.
        context_length: Maximum number of tokens in the input; the number of positions.
        emb_dim: Width of the embeddings; also of the residual stream. C in shapes.
        n_heads: Attention heads per block; must divide ``emb_dim``.
        n_layers: Number of transformer blocks.
        drop_rate: Dropout rate; applies after the embeddings, on the attention weights and before each shortcut
            (residual) connection.
        attn_drop_rate: Dropout rate on the attention weights; null = drop_rate. Any rate above 0
            disables the fastest attention kernels; on a CPU attention is then 1.5 to 4 times slower. On a
            CPU in bfloat16, windows of up to 512 tokens draw other random numbers than torch's fused kernel.
        emb_drop_rate: Dropout rate after the embeddings; null = drop_rate.
        qkv_bias: Whether the query, key and value projections have a bias (True in GPT-2, False in the
            book).
        tied_embeddings: Whether the output head shares the weights of the token embedding (True in
            GPT-2, False in the book). A tied model uses GPT-2's initialization, an untied model the
            book's, which is torch's default: with it the initial logits of a tied head would be far too large.

    Raises:
        ValueError: A value is invalid, or ``emb_dim`` is not divisible by ``n_heads``.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    drop_rate: float = 0.1
    qkv_bias: bool = False
    tied_embeddings: bool = False
    attn_drop_rate: float | None = None
    emb_drop_rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**31:
                raise ValueError(f"{name}: {value} is not a valid size; give a whole number from 1")
        for name in DROP_RATES:
            rate = getattr(self, name)
            if rate is not None and not 0.0 <= rate < 1.0:
                raise ValueError(f"{name}: {rate} is outside [0, 1); 0 turns dropout off")
        if self.emb_dim % self.n_heads:
            raise ValueError(
                f"emb_dim: {self.emb_dim} is not divisible by n_heads {self.n_heads}; "
                "change one of them"
            )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The config that a dict describes; ``ValueError`` if a key is unknown."""
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise ValueError(
                    f"config: {name} is not a setting of a GPTModel; {suggest(str(name), known)}"
                )
        return cls(**settings)

    @property
    def attention_drop_rate(self) -> float:
        return self.drop_rate if self.attn_drop_rate is None else self.attn_drop_rate

    @property
    def embedding_drop_rate(self) -> float:
        return self.drop_rate if self.emb_drop_rate is None else self.emb_drop_rate

    def differences(
        self, named: Mapping[str, Any], assumed: Collection[str] = ()
    ) -> dict[str, tuple[Any, Any]]:
        """Keys of ``named`` whose value differs from this config: key → (own value, other value).

        Only keys that determine the names and shapes of the weights are compared. The dropout rates do
        not: weights can be used with other rates. Keys in ``assumed`` were guessed and are skipped too.
        """
        own_values = asdict(self)
        return {
            name: (own_values[name], value)
            for name, value in named.items()
            if name not in (*DROP_RATES, *assumed) and own_values[name] != value
        }


GPT2_SIZES: dict[str, GPTConfig] = {
    name: GPTConfig(
        emb_dim=emb_dim, n_heads=n_heads, n_layers=n_layers, qkv_bias=True, tied_embeddings=True
    )
    for name, emb_dim, n_heads, n_layers in [
        ("gpt2-124M", 768, 12, 12),
        ("gpt2-355M", 1024, 16, 24),
        ("gpt2-774M", 1280, 20, 36),
        ("gpt2-1558M", 1600, 25, 48),
    ]
}

# names of the same four models on Hugging Face and in the book
_ALIASES = {
    "gpt2": "gpt2-124M",
    "gpt2-small": "gpt2-124M",
    "gpt2-medium": "gpt2-355M",
    "gpt2-large": "gpt2-774M",
    "gpt2-xl": "gpt2-1558M",
}
GPT2_NAMES = (*GPT2_SIZES, *_ALIASES)


def gpt2_size(name: str) -> str | None:
    """The key of :data:`GPT2_SIZES` for a public name of GPT-2; ``None`` for any other name."""
    name = name.removeprefix("openai-community/")
    return name if name in GPT2_SIZES else _ALIASES.get(name)
