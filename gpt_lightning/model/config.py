"""The architecture, in the book's words."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

DROP_RATES = ("drop_rate", "attn_drop_rate", "emb_drop_rate")


@dataclass(frozen=True)
class GPTConfig:
    """A GPT-2 style architecture under the book's configuration keys.

    Args:
        vocab_size: Number of token ids, V in shapes.
        context_length: Number of positions, the longest T the model can read.
        emb_dim: Width of the residual stream, C in shapes.
        n_heads: Attention heads per block; must divide ``emb_dim``.
        n_layers: Number of transformer blocks.
        drop_rate: Dropout after the embeddings, on the attention weights and before each shortcut.
        attn_drop_rate: Dropout on the attention weights where it is another: with any, attention leaves its
            fastest kernels, on a CPU by a factor of 1.5 to 4; none: drop_rate. On a CPU in bfloat16 windows up to
            512 draw other numbers for it than torch's kernel does.
        emb_drop_rate: Dropout after the embeddings where it differs; None: drop_rate.
        qkv_bias: Whether the query, key and value projections have a bias (GPT-2 has, the book not).
        tied_embeddings: Whether the output head is the token embedding (GPT-2), else it has weights of
            its own (the book). A tied model starts from GPT-2's initial weights, an untied one from the
            book's, torch's defaults: with those a tied head would start with logits far too large.

    Raises:
        ValueError: With the offending values, where no model of this form exists.
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
                raise ValueError(f"{name}: {value} is no size; give a whole number from 1")
        for name in DROP_RATES:
            rate = getattr(self, name)
            if rate is not None and not 0.0 <= rate < 1.0:
                raise ValueError(f"{name}: {rate} is outside [0, 1); 0 turns dropout off")
        if self.emb_dim % self.n_heads:
            raise ValueError(
                f"emb_dim: {self.emb_dim} is not divisible by n_heads {self.n_heads}; "
                "change one of them"
            )

    @property
    def attention_drop_rate(self) -> float:
        return self.drop_rate if self.attn_drop_rate is None else self.attn_drop_rate

    @property
    def embedding_drop_rate(self) -> float:
        return self.drop_rate if self.emb_drop_rate is None else self.emb_drop_rate

    def differences(
        self, named: Mapping[str, Any], assumed: Collection[str] = ()
    ) -> dict[str, tuple[Any, Any]]:
        """Keys that decide the weights' names and shapes, with both values, where ``named`` has another.

        The dropout rates are no such keys: old weights may go on under another dropout. Nor are those of
        ``assumed``, which were not known but guessed.
        """
        mine = asdict(self)
        return {
            name: (mine[name], value)
            for name, value in named.items()
            if name not in (*DROP_RATES, *assumed) and mine[name] != value
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

# the names that Hugging Face and the book give the same four
_OTHER_NAMES = {
    "gpt2": "gpt2-124M",
    "gpt2-small": "gpt2-124M",
    "gpt2-medium": "gpt2-355M",
    "gpt2-large": "gpt2-774M",
    "gpt2-xl": "gpt2-1558M",
}
GPT2_NAMES = (*GPT2_SIZES, *_OTHER_NAMES)


def gpt2_size(name: str) -> str | None:
    """The key of :data:`GPT2_SIZES` that a public name of GPT-2 stands for, None for any other name."""
    name = name.removeprefix("openai-community/")
    return name if name in GPT2_SIZES else _OTHER_NAMES.get(name)
