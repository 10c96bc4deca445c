"""Checks before the first step that a run can save."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt_lightning.training import checkpoint_io
from gpt_lightning.training.save_checks import check_content, check_is_replaceable, check_saves


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"callbacks": {"Mine": {"path": Path("x")}}}, "checkpoint.callbacks.Mine.path"),
        ({"a": [1, {"b": np.float64(1.0)}]}, "checkpoint.a.1.b"),
        ({"a": {Path("k"): 1}}, "a key of checkpoint.a"),
        ({"a": (lambda: 0)}, "checkpoint.a"),
        ({"a": np.zeros(2)}, "checkpoint.a"),
    ],
)
def test_value_that_would_not_load_is_named(content: Any, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: is a "):
        check_content(content)
    check_content({"a": [1, 2.0, None, True, b"x", "y", (torch.ones(1), {3})], 4: torch.float32})


def test_runs_that_start_together_do_not_refuse_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check_saves, [tmp_path] * 40))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["replace", "fsync_folder", "link_or_copy"])
def test_refused_step_of_a_save_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    from gpt_lightning.training import save_checks

    module = save_checks if step == "link_or_copy" else checkpoint_io
    monkeypatch.setattr(module, step, refuse)
    with pytest.raises(OSError, match=r"^Permission denied$"):
        check_saves(tmp_path)
    assert not list(tmp_path.iterdir())


def test_check_keeps_the_file_that_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"content")
    check_is_replaceable(path)
    assert path.read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["last.ckpt"]
