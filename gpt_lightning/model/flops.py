"""What a model costs, counted from its architecture alone: parameters, operations, a cache's bytes.

B windows of T tokens, C ``emb_dim``, V ``vocab_size``, L ``n_layers``.
"""

from gpt_lightning.model.config import GPTConfig


def embedding_parameters(config: GPTConfig) -> int:
    """Of tokens and positions, and of a head of its own where it is not tied."""
    heads = 1 if config.tied_embeddings else 2
    return heads * config.vocab_size * config.emb_dim + config.context_length * config.emb_dim


def block_parameters(config: GPTConfig) -> int:
    """Of one transformer block."""
    C = config.emb_dim
    attention = 3 * C * C + 3 * C * config.qkv_bias + C * C + C
    feed_forward = 8 * C * C + 5 * C
    return attention + feed_forward + 4 * C


def parameters(config: GPTConfig) -> int:
    """Of all weights, a tied head counted once."""
    blocks = config.n_layers * block_parameters(config)
    return embedding_parameters(config) + blocks + 2 * config.emb_dim


def kv_cache_bytes(config: GPTConfig, batch_size: int, length: int, itemsize: int = 4) -> int:
    """Of the keys and values that generating keeps, for ``length`` positions of ``batch_size`` texts."""
    return 2 * config.n_layers * batch_size * length * config.emb_dim * itemsize


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
