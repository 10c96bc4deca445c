"""What the tests of this folder use: a tiny model, its Hugging Face export, and HellaSwag."""

import bz2
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import ROOT

HELLASWAG = ROOT.parent / "shared" / "data" / "hellaswag_val.txt.bz2"
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2-test.txt"


def some_hellaswag(count: int, folder: Path) -> Path:
    """The first examples of HellaSwag's file in its form of six lines, as a file."""
    if not HELLASWAG.exists():
        pytest.skip(f"{HELLASWAG} is not here")
    lines = bz2.decompress(HELLASWAG.read_bytes()).decode().split("\n")[: 6 * count]
    path = folder / "hellaswag.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@torch.inference_mode()
def plain_logprobs(model: Any, ids: list[int], first: int) -> tuple[float, bool]:
    """Log-likelihood of ``ids[first:]`` by a model of transformers, one text at a time, and whether it is greedy."""
    logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    targets = torch.tensor(ids[1:])
    scores = logits.log_softmax(-1).gather(1, targets[:, None])[first - 1 :]
    return float(scores.sum()), bool((logits.argmax(-1) == targets)[first - 1 :].all())
