"""Bad sizes of a model."""

import math

import pytest

from gpt_lightning import GPTConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emb_dim": 100}, "emb_dim: 100 is not divisible by n_heads 12"),
        ({"n_layers": 0}, "n_layers: 0"),
        ({"vocab_size": -5}, "vocab_size: -5"),
        ({"drop_rate": 1.0}, r"drop_rate: 1.0 is outside \[0, 1\)"),
        ({"drop_rate": math.nan}, "drop_rate: nan"),
    ],
)
def test_invalid_configs_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)  # type: ignore[arg-type]
