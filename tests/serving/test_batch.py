"""Rows that share decoding steps have the logits that they have alone."""

import random

import pytest
import torch

from gpt_lightning import GPTModel
from gpt_lightning.serving.batch import DecodeBatch, DecodedRow
from helpers import tiny_gpt


def logits_alone(model: GPTModel, ids: list[int]) -> torch.Tensor:
    """Logits ``(V,)`` after ``ids``, computed without a cache."""
    window = torch.tensor([ids[-model.config.context_length :]])
    logits: torch.Tensor = model(window)[0, -1]
    return logits


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(5))
def test_rows_that_join_and_leave_have_the_logits_they_have_alone(seed: int) -> None:
    rng = random.Random(seed)
    model = tiny_gpt(context_length=rng.choice([8, 24, 150]))
    batch: DecodeBatch[DecodedRow] = DecodeBatch(model)
    num_checked = num_joined = 0
    for _ in range(120):
        new = [
            DecodedRow(ids, len(ids) + rng.randrange(0, 2 * model.config.context_length))
            for ids in (
                [
                    rng.randrange(97)
                    for _ in range(rng.randrange(1, model.config.context_length + 9))
                ]
                for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 5]))
            )
        ]
        if len(new) > 1 and rng.random() < 0.5:  # two samples of one prompt
            new[1] = DecodedRow(list(new[0].ids), new[0].max_length)
        if new and len(batch.rows) < 9:
            logits = model.head(batch.add(new)[:, -1])
            for row, row_logits in zip(new, logits, strict=True):
                torch.testing.assert_close(row_logits, logits_alone(model, row.ids))
                assert (row in batch.rows) == (row.num_remaining > 1)
                if row.num_remaining > 1:
                    row.ids.append(int(row_logits.argmax()))
                    num_joined += 1
        for row in [row for row in batch.rows if rng.random() < 0.05 or row.num_remaining < 1]:
            batch.remove(row)
        if not batch.rows:
            continue
        for row, row_logits in zip(*batch.step(), strict=True):
            torch.testing.assert_close(row_logits, logits_alone(model, row.ids))
            row.ids.append(rng.randrange(97))
            num_checked += 1
    assert num_checked > 150
    assert num_joined > 20


@torch.inference_mode()
def test_single_row_has_the_bits_it_has_alone() -> None:
    """A row that is left over moves to the first column, where the same kernels compute it."""
    model = tiny_gpt()
    batch: DecodeBatch[DecodedRow] = DecodeBatch(model)
    others = [DecodedRow([5] * 9, 40), DecodedRow([6] * 3, 40)]
    batch.add(others)
    for other in others:
        other.ids.append(1)
    row, alone = DecodedRow([1, 2, 3], 20), DecodedRow([1, 2, 3], 20)
    batch.add([row])
    for other in others:
        batch.remove(other)
    single: DecodeBatch[DecodedRow] = DecodeBatch(model)
    single.add([alone])
    for _ in range(10):
        row.ids.append(7)
        alone.ids.append(7)
        assert torch.equal(batch.step()[1], single.step()[1])
    assert row.padding == 0


@torch.inference_mode()
def test_lack_of_memory_while_rows_move_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt()
    batch: DecodeBatch[DecodedRow] = DecodeBatch(model)
    row = DecodedRow([1, 2, 3], 20)
    batch.add([row])
    row.ids.append(4)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda tensor: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            batch.add([DecodedRow([7] * 15, 20)])  # the first row has to move to the right
    assert batch.rows == [row]
    torch.testing.assert_close(batch.step()[1][0], logits_alone(model, row.ids))


@torch.inference_mode()
def test_row_that_needs_too_much_memory_leaves_the_batch_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_gpt()
    batch: DecodeBatch[DecodedRow] = DecodeBatch(model)
    row = DecodedRow([1, 2, 3], 12)
    batch.add([row])
    row.ids.append(4)
    with monkeypatch.context() as patch:
        patch.setattr(batch, "_reserve", lambda slots, width: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            batch.add([DecodedRow([7] * 20, 30)])
    assert batch.rows == [row]
    torch.testing.assert_close(batch.step()[1][0], logits_alone(model, row.ids))
