"""Average of the weights of several checkpoints."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import reduce

import torch
from torch import Tensor

from gpt_lightning.pretrained.weights import ModelWeights, stored_dtype


def average_weights(models: Mapping[str, ModelWeights]) -> ModelWeights:
    """The plain mean of the weights, computed in float64, one tensor at a time.

    It has the configuration and the tokenizer of the first model, and no optimizer state.

    Args:
        models: Two or more, by the names that messages have.

    Raises:
        ValueError: They have other architectures or other tokenizers, or values that are not finite.
    """
    (first_name, first), *others = models.items()
    for name, model in others:
        _check_same_kind(first_name, first, name, model)
    dtype = reduce(torch.promote_types, map(stored_dtype, models.values()))

    def mean(name: str) -> Tensor:
        total = torch.zeros_like(first.state_dict[name], dtype=torch.float64)
        for model in models.values():
            total += model.state_dict[name]
        if not total.isfinite().all():
            bad = next(
                n for n, model in models.items() if not model.state_dict[name].isfinite().all()
            )
            raise ValueError(
                f"average: {bad} has values that are not finite in {name}; leave it out"
            )
        return (total / len(models)).to(dtype)

    return replace(
        first,
        state_dict={name: mean(name) for name in first.state_dict},
        optimizer_state=None,
        warnings=tuple(dict.fromkeys(line for model in models.values() for line in model.warnings)),
    )


def _check_same_kind(first_name: str, first: ModelWeights, name: str, model: ModelWeights) -> None:
    # a number of heads that is assumed is compared, too: DEST has one number
    if differences := model.config.differences(asdict(first.config)):
        pairs = ", ".join(
            f"{key} is {theirs} there and {ours} in {first_name}"
            for key, (theirs, ours) in differences.items()
        )
        unsure = "n_heads" in differences and "n_heads" in first.assumed | model.assumed
        remedy = (
            "give the number of heads with --n_heads"
            if unsure
            else "give models of one architecture"
        )
        raise ValueError(f"average: {name} has another architecture: {pairs}; {remedy}")
    same_file = model.tokenizer.checksums == first.tokenizer.checksums
    if not same_file or model.other_tokenizer != first.other_tokenizer:
        theirs, ours = (each.other_tokenizer or each.tokenizer for each in (model, first))
        raise ValueError(
            f"average: {name} has another tokenizer than {first_name}: {theirs}, not {ours}; give models with one "
            "tokenizer"
        )
