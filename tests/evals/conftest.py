"""A tiny model and its Hugging Face export."""

from pathlib import Path
from typing import Any

import pytest

from servers import write_tiny_model


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with GPT-2's tokenizer, as a folder."""
    return write_tiny_model(tmp_path_factory.mktemp("judged") / "tiny", context_length=96)


@pytest.fixture(scope="session")
def peer(source: Path) -> Any:
    """The same model in transformers."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(source).eval()
