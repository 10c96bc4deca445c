"""Models for the tasks, and their Hugging Face exports."""

from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.cli.main import main
from helpers import QUICKSTART
from plain_likelihood import WIKITEXT
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


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that ``fit`` has trained on WikiText-2 for less than a minute, in Hugging Face's form."""
    text = WIKITEXT.with_name("wikitext-2-valid.txt")
    if not text.exists():
        pytest.skip(f"{text} is not here")
    folder = tmp_path_factory.mktemp("trained_on_wikitext")
    settings = {
        "model.config.context_length": 256, "model.config.emb_dim": 32, "model.config.n_heads": 2,
        "model.config.n_layers": 2, "model.config.drop_rate": 0, "model.config.tied_embeddings": True,
        "model.lr": 0.005, "data.text": text, "data.context_length": 128, "data.stride": 128,
        "data.batch_size": 4, "trainer.accelerator": "cpu", "trainer.max_steps": 200, "trainer.max_epochs": -1,
        "evaluation.eval_freq": 1000, "evaluation.prompt": "null", "trainer.default_root_dir": folder,
    }  # fmt: skip
    assert (
        main(["fit", QUICKSTART, "--run=wiki", *(f"--{k}={v}" for k, v in settings.items())]) == 0
    )
    run = str(folder / "checkpoints" / "wiki")
    assert main(["convert", run, str(folder / "hf"), "--format=hf"]) == 0
    return folder / "hf"
