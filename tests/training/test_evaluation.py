"""Evaluations: the same windows with any micro-batch, without effect on the run."""

import re

import numpy as np
import pytest

from helpers import Command
from runs import same_weights


def printed(out: str) -> list[tuple[float, float]]:
    return [
        (float(train), float(val))
        for train, val in re.findall(r"Train loss ([\d.]+), Val loss ([\d.]+)", out)
    ]


def test_evaluations_read_the_same_windows_with_any_micro_batch(fit: Command) -> None:
    settings = ["--data.global_batch_size=4", "--data.stride=8", "--trainer.max_steps=3",
                "--evaluation.eval_freq=1", "--evaluation.eval_iter=1", "--evaluation.prompt=null",
                "--model.config.drop_rate=0"]  # fmt: skip
    found = [
        printed(fit(f"--data.batch_size={n}", f"--run=of_{n}", *settings).out) for n in (4, 2, 1)
    ]
    assert len(found[0]) == 3
    for other in found[1:]:
        assert np.array(other) == pytest.approx(
            np.array(found[0]), abs=1.1e-3
        )  # three decimals are printed


def test_evaluations_do_not_change_the_run(fit: Command) -> None:
    common = ("--trainer.max_epochs=1", "--model.config.drop_rate=0.1")
    fit("--run=watched", "--evaluation.eval_freq=1", "--evaluation.log_next_token=true", *common)
    fit("--run=alone", "--evaluation.eval_freq=1000", "--evaluation.prompt=null", *common)
    assert same_weights("checkpoints/watched/last.ckpt", "checkpoints/alone/last.ckpt")
