"""What happens inside a model: the logit lens, and the attention weights of a block.

Forward hooks record what the model computes, so nothing of the model is written a second time here.

Shapes: T tokens, C ``emb_dim``, H ``n_heads``, D = C / H, V ``vocab_size``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.exploring.tokens import Json, token_json
from gpt_lightning.generation.sampling import (
    SamplingParams,
    check_finite,
    entropy,
    probabilities,
)
from gpt_lightning.model.gpt import GPTModel

NUM_TOP = 5


@contextmanager
def recorded_outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of ``modules``, in the order in which they run within the context."""
    outputs: list[Tensor] = []

    def record(module: nn.Module, arguments: object, output: Tensor) -> None:
        outputs.append(output)

    hooks = [module.register_forward_hook(record) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def hidden_states(model: GPTModel, ids: Sequence[int], positions: int) -> list[Tensor]:
    """Outputs ``(positions, C)`` of the embedding and of each block, at the last ``positions`` tokens."""
    with recorded_outputs([model.drop_emb, *model.trf_blocks]) as outputs:
        model.features(_window(model, ids))
    return [output[0, -positions:] for output in outputs]


@torch.inference_mode()
def lens_logits(model: GPTModel, hidden: Tensor) -> Tensor:
    """Logits ``(R, V)`` of hidden states ``(R, C)``: the last block's are the model's own."""
    return model.head(model.final_norm(hidden))


def layer_names(model: GPTModel) -> list[str]:
    """Names of the layers in :func:`hidden_states`."""
    return ["embedding", *(f"block {i + 1}" for i in range(model.config.n_layers))]


@torch.inference_mode()
def lens_json(model: GPTModel, tokenizer: Tokenizer, name: str, hidden: Tensor) -> Json:
    """What the model would say at each position if the layer were the last one.

    Args:
        hidden: ``(positions, C)``, of the layer ``name``.

    Raises:
        ValueError: The logits are not finite.
    """
    logits = lens_logits(model, hidden)
    check_finite(logits.amax(dim=-1))
    p = probabilities(logits, SamplingParams(temperature=1.0))
    top = p.topk(min(NUM_TOP, p.shape[1]), dim=-1)
    columns = zip(entropy(p).tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return {
        "name": name,
        "positions": [
            {
                "top": [
                    {**token_json(tokenizer, token), "probability": probability}
                    for token, probability in zip(tokens, top_p, strict=True)
                ],
                "entropy": nats,
            }
            for nats, tokens, top_p in columns
        ],
    }


@torch.inference_mode()
def attention_weights(model: GPTModel, ids: Sequence[int], layer: int, num_rows: int) -> Tensor:
    """Attention weights ``(H, R, T)`` of the last R tokens, at most ``num_rows``, in float32 or wider on the host.

    They are computed from the queries and keys of the model, which does not keep its weights.

    Args:
        layer: Number of the block, from 0.

    Raises:
        ValueError: The weights are not finite.
    """
    config = model.config
    block = model.trf_blocks[layer]
    with recorded_outputs([block.att.qkv]) as outputs:  # type: ignore[union-attr, list-item]
        model.features(_window(model, ids))
    qkv = outputs[0][0]  # (T, 3C)
    qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    T, D = len(qkv), config.emb_dim // config.n_heads
    q, k, _ = qkv.view(T, 3, config.n_heads, D).permute(1, 2, 0, 3)  # (H, T, D)
    scores = q[:, -num_rows:] @ k.transpose(1, 2) * D**-0.5
    R = scores.shape[1]
    is_future = torch.ones(R, T, dtype=torch.bool, device=scores.device).triu(T - R + 1)
    weights = scores.masked_fill(is_future, -torch.inf).softmax(dim=-1).cpu()
    if not torch.isfinite(weights).all():
        raise ValueError("attention: has NaN; the model's weights are damaged")
    return weights


def _window(model: GPTModel, ids: Sequence[int]) -> Tensor:
    """The ids that the model reads, ``(1, T)``, on its device."""
    window = ids[-model.config.context_length :]
    return torch.tensor([window], device=model.tok_emb.weight.device)
