"""What a model costs, counted from its architecture alone: parameters and floating-point operations.

B windows of T tokens, C ``emb_dim``, V ``vocab_size``, L ``n_layers``.
"""

from gpt_lightning.model.config import GPTConfig


def parameters(config: GPTConfig) -> int:
    """Of all weights, a tied head counted once."""
    C, V = config.emb_dim, config.vocab_size
    attention = 3 * C * C + 3 * C * config.qkv_bias + C * C + C
    feed_forward = 8 * C * C + 5 * C
    block = attention + feed_forward + 4 * C
    heads = 1 if config.tied_embeddings else 2
    return heads * V * C + config.context_length * C + config.n_layers * block + 2 * C


def flops_per_token(
    config: GPTConfig, length: int, *, vocab_size: int | None = None, training: bool = True
) -> int:
    """Of the matrix products, a multiplication and an addition each counted; in windows of ``length``.

    Attention is counted as a full T × T matrix, as in PaLM's appendix B and llm.c, and the backward
    pass as twice the forward one. Norms, GELU, softmax and the optimizer are left out.

    Args:
        length: T.
        vocab_size: Rows of the head as it is computed, where that is padded; none: V.
        training: Whether a backward pass follows.
    """
    C, L = config.emb_dim, config.n_layers
    matrices = 12 * L * C * C + (vocab_size or config.vocab_size) * C
    attention = 2 * L * length * C  # queries with keys, and weights with values
    forward = 2 * matrices + 2 * attention
    return 3 * forward if training else forward
