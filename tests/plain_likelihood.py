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
def plain_logprobs(model: Any, ids: list[int], first: int) -> float:
    """Log-likelihood of ``ids[first:]`` by a model of transformers, one text at a time."""
    targets = torch.tensor(ids[first:])
    logits = model(torch.tensor([ids[:-1]]), logits_to_keep=len(targets)).logits[0]
    scores = logits.gather(1, targets[:, None])[:, 0].double() - logits.logsumexp(-1).double()
    return float(scores.sum())
