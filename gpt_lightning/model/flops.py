"""Parameter counts, FLOPs and KV cache size of a model, computed from its configuration.

Symbols: B batch size, T tokens per window, C ``emb_dim``, V ``vocab_size``, L ``n_layers``.
"""

from gpt_lightning.model.config import GPTConfig


def embedding_parameters(config: GPTConfig) -> int:
    """Number of parameters of the token and position embeddings, and of the output head if it is not tied."""
    vocab_matrices = 1 if config.tied_embeddings else 2
    return (vocab_matrices * config.vocab_size + config.context_length) * config.emb_dim


def block_parameters(config: GPTConfig) -> int:
    """Number of parameters of one transformer block."""
    C = config.emb_dim
    attention = 3 * C * C + 3 * C * config.qkv_bias + C * C + C
    feed_forward = 8 * C * C + 5 * C
    layer_norms = 4 * C
    return attention + feed_forward + layer_norms


def block_matrix_parameters(config: GPTConfig) -> int:
    """Number of parameters of the matrices of all blocks: 4·C² of attention and 8·C² of the feed-forward network each."""
    return 12 * config.n_layers * config.emb_dim**2


def muon_flops(config: GPTConfig) -> int:
    """FLOPs of Muon's matrix products in an optimizer step.

    Each of 5 Newton–Schulz steps takes 2·m²·n + 2·m³ + 2·m²·n for a matrix of m ≤ n: four of C × C and two of C × 4C
    per block.
    """
    C = config.emb_dim

    def matrix(m: int, n: int) -> int:
        return 5 * (4 * m * m * n + 2 * m**3)

    return config.n_layers * (4 * matrix(C, C) + 2 * matrix(C, 4 * C))


def parameters(config: GPTConfig) -> int:
    """Number of parameters of the model. A tied head is counted once."""
    blocks = config.n_layers * block_parameters(config)
    final_norm = 2 * config.emb_dim
    return embedding_parameters(config) + blocks + final_norm


def kv_cache_bytes(config: GPTConfig, batch_size: int, length: int, itemsize: int = 4) -> int:
    """Bytes of the KV cache for ``length`` positions of ``batch_size`` texts."""
    return 2 * config.n_layers * batch_size * length * config.emb_dim * itemsize


def flops_per_token(
    config: GPTConfig, length: int, *, vocab_size: int | None = None, training: bool = True
) -> int:
    """FLOPs of the matrix products for one token. A multiplication and an addition count as two.

    Attention is counted as a full T × T matrix, as in PaLM's appendix B and in llm.c. The backward
    pass is counted as twice the forward pass. LayerNorm, GELU, softmax and the optimizer are left out.

    Args:
        length: T, the window length.
        vocab_size: Rows of the output head as computed, if the vocabulary is padded; ``None``: V.
        training: Whether to add the backward pass.
    """
    C, L = config.emb_dim, config.n_layers
    matrices = 12 * L * C * C + (vocab_size or config.vocab_size) * C
    attention = 2 * L * length * C  # queries × keys, and weights × values
    forward = 2 * matrices + 2 * attention
    return 3 * forward if training else forward
