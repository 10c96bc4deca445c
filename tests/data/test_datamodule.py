"""The global batch: the same windows in each optimizer step on any number of devices."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt_lightning import GPTConfig, TextDataModule, load_model
from gpt_lightning.data import dataloader as loader_module
from gpt_lightning.data.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, GPT2
from helpers import (
    ROOT,
    Command,
    flatten,
    window_numbers,
)
from runs import (
    BARE,
)


def data_of_rank(
    world_size: int, rank: int, length: int = 8, limit: float | None = None, **settings: Any
) -> TextDataModule:
    """Data module of one rank of several, without processes."""
    data = TextDataModule(**{"text": "sample", "train_ratio": 0.1, **settings})
    trainer = SimpleNamespace(
        world_size=world_size, global_rank=rank, local_rank=rank, accumulate_grad_batches=1,
        limit_train_batches=limit, overfit_batches=0, state=SimpleNamespace(fn="fit"),
        strategy=SimpleNamespace(barrier=lambda: None, root_device=torch.device("cpu")),
        lightning_module=SimpleNamespace(config=GPTConfig(context_length=length), tokenizer=GPT2),
    )  # fmt: skip
    data.trainer = trainer  # type: ignore[assignment]
    data.setup("fit")
    return data


def windows_of_steps(
    world_size: int, batch_size: int, workers: int, **settings: Any
) -> list[list[int]]:
    """Windows of each step of two epochs, over all ranks and accumulated batches."""
    of_ranks = []
    for rank in range(world_size):
        data = data_of_rank(
            world_size, rank, batch_size=batch_size, num_workers=workers, **settings
        )  # fmt: skip
        loader, accumulate = data.train_dataloader(), data.trainer.accumulate_grad_batches
        assert accumulate == 32 // (world_size * batch_size)
        batches = window_numbers(loader, 2)
        of_ranks.append([
            flatten(batches[i : i + accumulate]) for i in range(0, len(batches), accumulate)
        ])  # fmt: skip
    return [sorted(flatten(list(parts))) for parts in zip(*of_ranks, strict=True)]


@pytest.mark.parametrize("source", ["text", "mixture", "bijection"])
def test_steps_read_the_same_windows_on_any_number_of_devices(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"global_batch_size": 32}
    if source == "mixture":
        other = ROOT / "tests" / "book.py"
        settings["mixture"] = {"sample": 1.0, str(other): 3.0}
    if source == "bijection":
        monkeypatch.setattr(loader_module, "MAX_IN_MEMORY", 10)
    expected = windows_of_steps(1, 1, 0, **settings)
    assert len(expected) == 2 * (len(data_of_rank(1, 0, **settings)._windows["training"]) // 32) > 3
    assert all(len(update) == 32 for update in expected)
    if source != "mixture":  # no window twice in an epoch
        for epoch in (expected[: len(expected) // 2], expected[len(expected) // 2 :]):
            assert len(set(flatten(epoch))) == len(flatten(epoch))
    for world_size, batch_size, workers in itertools.product((1, 2, 4, 8), (1, 2, 4), (0, 1, 2)):
        assert windows_of_steps(world_size, batch_size, workers, **settings) == expected


@pytest.mark.parametrize(("limit", "updates_an_epoch"), [(3, 3), (1, 1), (0.5, None), (1000, None)])
def test_a_limit_counts_optimizer_steps_for_any_batch_size(
    limit: float, updates_an_epoch: int | None
) -> None:
    """With a global batch, each step has its number of windows on any devices."""
    settings = {"global_batch_size": 32, "stride": 3}
    whole = len(windows_of_steps(1, 1, 0, **settings)) // 2
    assert whole > 3
    expected = updates_an_epoch or (int(limit * whole) if limit < 1 else whole)
    first = windows_of_steps(1, 1, 0, limit=limit, **settings)
    assert [len(update) for update in first] == [32] * 2 * expected
    for world_size, batch_size in itertools.product((1, 2, 4), (1, 2, 4)):
        assert windows_of_steps(world_size, batch_size, 0, limit=limit, **settings) == first


def test_document_mask_is_used_in_training_and_validation(
    fit: Command, command: Command, tmp_path: Path
) -> None:
    words = [f"The {i}th bell rang over the harbour at noon. " for i in range(120)]
    (tmp_path / "my.txt").write_text("".join(
        END_OF_TEXT * (i % 3 == 0) + word for i, word in enumerate(words)
    ))  # fmt: skip
    own = ("--data.text=my.txt", "--data.train_ratio=0.5", "--data.stride=16")

    def validation_loss(*arguments: str) -> float:
        result = command("validate", "--config=checkpoints/quickstart/config.yaml", "--json",
                       "--ckpt_path=last", *arguments)  # fmt: skip
        return float(json.loads(result.out)["val_loss"])

    fit(*BARE, *own, "--data.document_mask=true", "--trainer.max_steps=4", "--model.lr=0.01",
        "--model.loss_chunk_size=7", "--model.activation_checkpointing=true")  # fmt: skip
    # by hand, over the same windows
    data = data_of_rank(1, 0, 16, text="my.txt", train_ratio=0.5, stride=16, document_mask=True)
    model = load_model("checkpoints/quickstart")
    losses, most = [], 0
    for inputs, targets, documents in data.validation_windows():
        assert torch.equal(documents, (inputs == END_OF_TEXT_ID).cumsum(dim=1))
        most = max(most, int(documents.max()))
        with torch.no_grad():
            logits = model(inputs, documents=documents)
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none"))  # fmt: skip
    assert most > 0
    expected = float(torch.cat(losses).mean())
    assert validation_loss() == pytest.approx(expected, abs=1e-5)
    assert abs(validation_loss("--data.document_mask=false") - expected) > 1e-4
