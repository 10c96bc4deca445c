"""Resume with other windows, another model or another run's checkpoint is refused."""

from pathlib import Path

import pytest

from helpers import SMALL_QUICKSTART, Command, assert_refused
from runs import BARE, file_times

LINES = [f"Line {i} of a text of its own.\n" for i in range(300)]


@pytest.fixture(scope="module")
def first_runs() -> dict[tuple[str, ...], Path]:
    """Folders of runs of 5 steps, by the settings they started with."""
    return {}


@pytest.mark.parametrize(
    ("first", "resumed", "expected"),
    [
        ([], ["--data.stride=30"], "data.stride: the run has 40, here is 30"),
        # as many windows
        (["--data.stride=100"], ["--data.stride=101"], "data.stride: the run has 100, here is 101"),
        ([], ["--data.context_length=15"], "data.context_length: the run has 16, here is 15"),
        ([], ["--data.document_mask=true"], "data.document_mask: the run has False"),
        ([], ["--seed_everything=7"], "seed_everything: the run has 123, here is 7"),
        ([], ["--rng=global"], "rng: the run has step, here is global"),
        (
            [],
            ["--trainer.overfit_batches=2"],
            "trainer.overfit_batches: the run was started without",
        ),
        ([], ["--data.train_ratio=0.11"], "data.text: the training text is not the one"),
        ([], ["--data.text=middle.txt"], "data.text: the training text is not the one"),
        ([], ["--data.text=end.txt"], "data.text: the validation text is not the one"),
        (
            ["--data.mixture={my.txt: 1, sample: 2}"],
            ["--data.mixture={my.txt: 1, sample: 3}"],
            "data.mixture: the run has drawn on 0.3333 of",
        ),
        (
            ["--data.mixture={my.txt: 1, sample: 2}"],
            ["--data.mixture={my.txt: 1, sample: 2}", "--seed_everything=124"],
            "seed_everything: the run has 123, here is 124",
        ),
        (
            ["--data.mixture={my.txt: 1, end.txt: 1}"],
            ["--data.mixture={end.txt: 1, my.txt: 1}"],
            "data.text: the validation text is not the one",
        ),
        (["--data.mixture={my.txt: 1}"], [], "data.mixture: the run has drawn on 1 of"),
    ],
)
def test_resume_with_other_windows_is_refused(
    fit: Command,
    command: Command,
    first_runs: dict[tuple[str, ...], Path],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    first: list[str],
    resumed: list[str],
    expected: str,
) -> None:
    """Each setting that decides a window is named in one line, and no file of the run is changed."""
    key = tuple(first)
    is_new = key not in first_runs
    folder = first_runs.setdefault(key, tmp_path_factory.mktemp("first") if is_new else Path())
    monkeypatch.chdir(folder)
    if is_new:
        for name, line in (("my.txt", None), ("middle.txt", 15), ("end.txt", -15)):
            text = list(LINES)
            if line is not None:  # as many tokens, neither the first nor the last
                text[line] = text[line].replace("Line", "Word")
            Path(name).write_text("".join(text), encoding="utf-8")
        fit("--data.text=my.txt", *first, "--trainer.max_steps=5")
    before = file_times(Path("checkpoints"))
    result = command("fit", *SMALL_QUICKSTART, "--ckpt_path=last", "--trainer.max_steps=9",
                     "--data.text=my.txt", *resumed)  # fmt: skip
    assert (result.code, result.error.count("\n")) == (2, 1), result.err
    assert result.error.startswith(f"gpt_lightning: error: {expected}"), result.err
    assert file_times(Path("checkpoints")) == before


def test_batch_size_that_does_not_divide_the_position_is_refused(
    fit: Command, command: Command
) -> None:
    fit("--trainer.max_steps=5")
    again = ("fit", *SMALL_QUICKSTART, "--ckpt_path=last")
    result = command(*again, "--data.batch_size=4")
    assert (
        "cut after 10 windows of an epoch, which is not a multiple of 4 windows per batch"
        in result.err
    )
    fit("--ckpt_path=last", "--data.batch_size=5", "--trainer.max_steps=7")


def test_global_batch_that_does_not_divide_the_position_is_refused(
    fit: Command, command: Command
) -> None:
    fit(*BARE, "--trainer.max_steps=3")
    result = command(
        "fit", *SMALL_QUICKSTART, *BARE, "--ckpt_path=last", "--data.global_batch_size=4"
    )
    assert_refused(
        result,
        "cut after 6 windows of an epoch, which is not a multiple of 4 windows per optimizer step",
    )


def test_checkpoint_of_another_run_is_refused(fit: Command, command: Command) -> None:
    fit("--trainer.max_steps=1")
    fit("--trainer.max_steps=1", "--run=other")
    result = command(
        "fit", *SMALL_QUICKSTART,
        "--ckpt_path=checkpoints/other/last.ckpt",
    )  # fmt: skip
    assert result.code == 2
    assert "is of another run than checkpoints/quickstart" in result.err


def test_resume_of_another_architecture_is_refused_with_both_values(
    fit: Command, command: Command
) -> None:
    fit("--trainer.max_steps=2")
    result = command(
        "fit", *SMALL_QUICKSTART, "--ckpt_path=last",
        "--trainer.max_steps=9", "--model.config.emb_dim=32",
    )  # fmt: skip
    assert result.code == 2
    assert "model.config.emb_dim is 8 there and 32 here" in result.err
    assert result.error.count("\n") == 1
