"""Tokens and figures in the JSON form that the page reads."""

import math
from collections.abc import Iterable
from typing import Any

from gpt_lightning.data.tokenizer import Tokenizer

Json = dict[str, Any]


def token_json(tokenizer: Tokenizer, token: int) -> Json:
    """Id, text and bytes of a token. In the text, an incomplete character is U+FFFD."""
    content = tokenizer.decode_bytes([token])
    return {"id": token, "text": content.decode("utf-8", errors="replace"), "bytes": content.hex()}


def tokens_json(tokenizer: Tokenizer, ids: Iterable[int]) -> list[Json]:
    """:func:`token_json` of each id."""
    return [token_json(tokenizer, token) for token in ids]


def finite_or_none(value: float) -> float | None:
    """``value``, or ``None`` if it is infinite or NaN, which JSON cannot hold."""
    return value if math.isfinite(value) else None
