"""Windows at scale: their order, the global batch, the end in tokens, documents, mixtures."""

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, SMALL, Command, python
from lightning.pytorch import Callback
from test_bad_input import refused

from gpt_lightning import GPTConfig, GPTModel, TextDataModule, load_model
from gpt_lightning.data import dataloader as loader_module
from gpt_lightning.data.dataloader import ResumableDataLoader
from gpt_lightning.data.dataset import ConcatWindowDataset, WindowDataset
from gpt_lightning.data.sampler import FeistelPermutation, MixtureSampler, shuffled
from gpt_lightning.data.tokenizer import END_OF_TEXT, END_OF_TEXT_ID
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training.metrics import TokenWeightedLoss
from gpt_lightning.training.verify_resume import compare_checkpoints

QUICKSTART = f"--config={ROOT}/configs/quickstart.yaml"


def some_tokens(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 50257, n).astype(np.uint16)


def numbers(loader: ResumableDataLoader, passes: int = 1) -> list[list[int]]:
    """Of the windows of each batch."""
    return [loader.handed_out.tolist() for _ in range(passes) for _ in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


# windows


@pytest.mark.parametrize("cuts", [[], [37], [0, 1, 2, 3, 50, 50, 99, 100], list(range(0, 101, 5))])
@pytest.mark.parametrize(("length", "stride"), [(1, 1), (8, 3), (8, 8), (8, 30), (99, 7)])
def test_a_stream_in_parts_has_the_windows_of_the_whole(
    cuts: list[int], length: int, stride: int
) -> None:
    tokens = some_tokens(100)
    whole = WindowDataset([tokens], length, stride)
    parts = WindowDataset(np.split(tokens, cuts), length, stride)
    assert parts.shape == whole.shape
    order = np.random.default_rng(0).permutation(len(whole))
    expected = [tokens[i * stride : i * stride + length + 1].tolist() for i in order]
    assert parts.read(order).tolist() == whole.read(order).tolist() == expected


def test_pages_of_a_mapped_file_are_let_go(tmp_path: Path) -> None:
    """Windows from all over 400 MB, of which a fault makes 64 kB resident."""
    path, n = tmp_path / "tokens", 2 * 10**8
    with path.open("wb") as file:
        file.truncate(2 * n)
    parts = [np.memmap(path, "<u2", "r", n * i // 2, (n // 4,)) for i in range(4)]
    before = psutil.Process().memory_info().rss
    loader = ResumableDataLoader(WindowDataset(parts, 256, 64), 16, shuffle=True, drop_last=True)
    most = 0
    for i, _ in zip(range(500), loader, strict=False):
        if i % 10 == 0:
            most = max(most, psutil.Process().memory_info().rss - before)
    assert len(loader.windows) > 3 * 10**6  # whose order as an array would be 24 MB
    assert most < 50e6


# order


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 1000, 4095, 4096, 4097, 65537, 999_983])
def test_order_is_a_bijection(n: int) -> None:
    order = FeistelPermutation(n, 7)(np.arange(n))
    assert np.array_equal(np.sort(order), np.arange(n))
    # of each place alone, in any order of asking
    some = np.random.default_rng(0).integers(0, n, 50)
    assert np.array_equal(FeistelPermutation(n, 7)(some), order[some])
    if n > 30:
        assert not np.array_equal(FeistelPermutation(n, 8)(np.arange(n)), order)


def chi_squared(observed: np.ndarray) -> float:
    """In standard deviations from what uniform counts have."""
    expected, freedom = observed.mean(), observed.size - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("make", [FeistelPermutation, shuffled])
def test_order_looks_random(make: Callable[[int, int], Any]) -> None:
    """As randperm does: where the stretches of a pass fall, what follows what, over places and over seeds."""
    n = 100_003
    order = make(n, 3)(np.arange(n))
    stretches, thirds = np.arange(n) * 50 // n, order * 50 // n
    assert abs(chi_squared(np.bincount(stretches * 50 + thirds))) < 5
    steps = np.diff(order) % n
    assert abs(chi_squared(np.bincount(steps * 1000 // n))) < 5
    assert np.unique(steps).size > 0.6 * n  # 1 - 1/e
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / math.sqrt(n)
    # the same few places under many seeds, in a small n where a weak order would show
    orders = np.stack([make(12, seed)(np.arange(12)) for seed in range(6000)])
    for place in range(12):
        assert abs(chi_squared(np.bincount(orders[:, place], minlength=12))) < 5
    pairs = np.bincount(orders[:, 0] * 12 + orders[:, 1], minlength=144).reshape(12, 12)
    assert np.all(np.diag(pairs) == 0)
    assert abs(chi_squared(pairs[~np.eye(12, dtype=bool)])) < 5


@pytest.mark.parametrize("most", [10, 1000])
def test_a_pass_is_gone_on_with_at_once(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the order as an array and computed; with another batch size, and in the passes after."""
    monkeypatch.setattr(loader_module, "MAX_IN_MEMORY", most)

    def loader(batch_size: int) -> ResumableDataLoader:
        tokens = WindowDataset([some_tokens(4 * 24 + 1)], 4, 4)
        return ResumableDataLoader(tokens, batch_size, shuffle=True, drop_last=True, seed=5)

    whole = loader(4)
    expected = flat(numbers(whole, 3))
    assert expected[:24] != expected[24:48]
    assert sorted(expected[:24]) == sorted(expected[24:48]) == list(range(24))
    cut = loader(4)
    numbers(cut)
    for _ in zip(range(3), cut, strict=False):
        pass
    resumed = loader(2)
    resumed.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert flat(numbers(resumed, 2)) == expected[36:]


def test_a_position_from_before_there_was_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The epoch goes on in the order of an array, whatever their number."""
    monkeypatch.setattr(loader_module, "MAX_IN_MEMORY", 10)
    loader = ResumableDataLoader(
        WindowDataset([some_tokens(49)], 4, 4), 3, shuffle=True, drop_last=True
    )
    state = {"epoch": 1, "windows_seen": 6, "order_seed": 99}
    loader.load_state_dict(state)
    assert flat(numbers(loader)) == shuffled(12, 99)(np.arange(6, 12)).tolist()
    assert flat(numbers(loader)) != shuffled(12, loader.state_dict()["order_seed"])(np.arange(12)).tolist()  # fmt: skip


# the global batch


def data_on(
    world_size: int, rank: int, length: int = 8, limit: float | None = None, **settings: Any
) -> TextDataModule:
    """Of one of several processes, which need not be there."""
    data = TextDataModule(**{"text": "sample", "train_ratio": 0.1, **settings})
    trainer = SimpleNamespace(
        world_size=world_size, global_rank=rank, local_rank=rank, accumulate_grad_batches=1,
        limit_train_batches=limit, overfit_batches=0, state=SimpleNamespace(fn="fit"),
        strategy=SimpleNamespace(barrier=lambda: None, root_device=torch.device("cpu")),
        lightning_module=SimpleNamespace(config=GPTConfig(context_length=length)),
    )  # fmt: skip
    data.trainer = trainer  # type: ignore[assignment]
    data.setup("fit")
    return data


def updates(world_size: int, batch_size: int, workers: int, **settings: Any) -> list[list[int]]:
    """The windows of each update of two epochs, over all ranks and accumulated batches."""
    of_ranks = []
    for rank in range(world_size):
        data = data_on(
            world_size, rank, batch_size=batch_size, num_workers=workers, **settings
        )  # fmt: skip
        loader, accumulate = data.train_dataloader(), data.trainer.accumulate_grad_batches
        assert accumulate == 32 // (world_size * batch_size)
        batches = numbers(loader, 2)
        of_ranks.append([
            flat(batches[i : i + accumulate]) for i in range(0, len(batches), accumulate)
        ])  # fmt: skip
    return [sorted(flat(list(parts))) for parts in zip(*of_ranks, strict=True)]


@pytest.mark.parametrize("source", ["text", "mixture", "bijection"])
def test_stream_is_the_same_on_any_number_of_devices(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"global_batch_size": 32}
    if source == "mixture":
        other = Path(__file__).parent / "book.py"
        settings["mixture"] = {"sample": 1.0, str(other): 3.0}
    if source == "bijection":
        monkeypatch.setattr(loader_module, "MAX_IN_MEMORY", 10)
    expected = updates(1, 1, 0, **settings)
    assert len(expected) == 2 * (len(data_on(1, 0, **settings)._windows["training"]) // 32) > 3
    assert all(len(update) == 32 for update in expected)
    if source != "mixture":  # nothing twice in an epoch
        for epoch in (expected[: len(expected) // 2], expected[len(expected) // 2 :]):
            assert len(set(flat(epoch))) == len(flat(epoch))
    for world_size, batch_size, workers in itertools.product((1, 2, 4, 8), (1, 2, 4), (0, 1, 2)):
        assert updates(world_size, batch_size, workers, **settings) == expected


@pytest.mark.parametrize(("limit", "updates_an_epoch"), [(3, 3), (1, 1), (0.5, None), (1000, None)])
def test_a_limit_counts_whole_steps_for_any_batch_size(
    limit: float, updates_an_epoch: int | None
) -> None:
    """With a global batch: all updates of all devices and batch sizes have its windows."""
    settings = {"global_batch_size": 32, "stride": 3}
    whole = len(updates(1, 1, 0, **settings)) // 2
    assert whole > 3
    expected = updates_an_epoch or (int(limit * whole) if limit < 1 else whole)
    first = updates(1, 1, 0, limit=limit, **settings)
    assert [len(update) for update in first] == [32] * 2 * expected
    for world_size, batch_size in itertools.product((1, 2, 4), (1, 2, 4)):
        assert updates(world_size, batch_size, 0, limit=limit, **settings) == first


def test_a_limit_that_leaves_no_whole_update_is_refused(command: Command) -> None:
    done = command("fit", QUICKSTART, *SMALL, "--data.global_batch_size=4",
                   "--trainer.limit_train_batches=0.01", "--trainer.max_steps=1")  # fmt: skip
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "trainer.limit_train_batches: 0.01 leaves none of the" in done.err


class Record(Callback):
    """Of each update: step, loss, windows, how far its gradient is off that of its windows' mean loss."""

    updates: ClassVar[list[tuple[int, float, list[int], float]]] = []

    def __init__(self) -> None:
        self.updates.clear()
        self.loss: float = 0.0
        self.windows: list[int] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.windows += trainer.train_dataloader.handed_out.tolist()

    def on_before_backward(self, trainer: Any, module: Any, loss: torch.Tensor) -> None:
        self.loss += float(loss.detach())

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        drawn = trainer.datamodule._windows["training"].read(np.array(self.windows))
        ids = torch.from_numpy(drawn)
        parameters = list(module.parameters())
        with torch.enable_grad():
            loss = module.loss((ids[:, :-1], ids[:, 1:]))
            grads = torch.autograd.grad(loss, parameters)
        pairs = zip(grads, parameters, strict=True)
        error = max(float((grad - p.grad).abs().max() / grad.abs().max()) for grad, p in pairs)
        self.updates.append((trainer.global_step, self.loss, self.windows, error))
        self.loss, self.windows = 0.0, []


BARE = ("--model.config.drop_rate=0", "--evaluation.prompt=null", "--evaluation.eval_freq=100",
        "--evaluation.eval_iter=1", "--checkpoint.save_best=false", "--model.warmup_steps=0",
        "--trainer.logger=false")  # fmt: skip
RECORD = ("--allow_import=test_windows", "--trainer.callbacks+=test_windows.Record")


def last(run: str) -> dict[str, Any]:
    return dict(read_checkpoint(Path(f"checkpoints/{run}/last.ckpt")))


def same_bits(one: str, other: str) -> bool:
    files = [Path(f"checkpoints/{run}/last.ckpt") for run in (one, other)]
    return not any(part.difference for part in compare_checkpoints(*files))


def test_updates_are_the_same_with_any_micro_batch(fit: Command) -> None:
    """Also of a run that is cut in the middle of an epoch and goes on in other batches."""

    def run(name: str, batch_size: int, *arguments: str) -> list[Any]:
        fit(*BARE, *RECORD, "--data.global_batch_size=4", "--trainer.max_epochs=2",
            f"--run={name}", f"--data.batch_size={batch_size}", *arguments)  # fmt: skip
        return list(Record.updates)

    whole = run("whole", 4)
    others = [run("small", 1)]
    for name, before, after in [("finer", 4, 2), ("coarser", 1, 4)]:
        others.append(run(name, before, "--trainer.max_steps=4"))
        others[-1] += run(name, after, "--ckpt_path=last")
    assert [step for step, *_ in whole] == list(range(6))  # 15 windows an epoch
    for other in others:
        assert [(u[0], u[2]) for u in other] == [(u[0], u[2]) for u in whole]
        assert [u[1] for u in other] == pytest.approx([u[1] for u in whole], abs=1e-5)
    assert all(error < 1e-4 for updates in (whole, *others) for *_, error in updates)
    for name, value in last("whole")["state_dict"].items():
        for run_name in ("small", "finer", "coarser"):
            other_value = last(run_name)["state_dict"][name]
            torch.testing.assert_close(other_value, value, atol=1e-3, rtol=0)
    for run_name in ("whole", "small", "finer", "coarser"):
        assert last(run_name)["tokens_seen"] == 6 * 4 * 16


def test_a_last_partial_accumulation_is_a_mean_too(fit: Command) -> None:
    """Without a global batch: 7 batches of 2 windows, of which 4 are an update and 3 are left."""
    fit(*BARE, *RECORD, "--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=4",
        "--trainer.enable_checkpointing=false")  # fmt: skip
    assert [len(windows) for _, _, windows, _ in Record.updates] == [8, 6, 8, 6]
    assert all(error < 1e-4 for *_, error in Record.updates)
    assert all(10.0 < loss < 12.0 for _, loss, _, _ in Record.updates)  # ln V is 10.8


# max_tokens


def test_a_run_ends_with_its_tokens(fit: Command) -> None:
    """In mid-epoch and at its end, with the checkpoint that max_steps leaves; and goes on to the same bits."""

    def run(name: str, *arguments: str) -> str:
        return fit(*BARE, "--model.config.drop_rate=0.1", f"--run={name}", *arguments,
                   "--trainer.max_epochs=null").err  # fmt: skip

    run("straight", "--trainer.max_steps=13")
    # 32 tokens an update, 7 updates an epoch
    for name, tokens, steps in [("in-mid-epoch", 230, 8), ("at-its-end", 224, 7)]:
        assert f"step 0 of {steps} (" in run(name, f"--max_tokens={tokens}")
        assert (last(name)["global_step"], last(name)["tokens_seen"]) == (steps, 32 * steps)
        before = Path(f"checkpoints/{name}/last.ckpt").stat().st_mtime_ns
        run(name, f"--max_tokens={tokens}", "--ckpt_path=last")
        assert Path(f"checkpoints/{name}/last.ckpt").stat().st_mtime_ns == before
        assert f"step {steps} of 13 (" in run(name, "--max_tokens=416", "--ckpt_path=last")
        assert last(name)["tokens_seen"] == 416
        assert same_bits(name, "straight")


# documents


def tiny_model() -> GPTModel:
    torch.manual_seed(1)
    return GPTModel(GPTConfig(context_length=24, emb_dim=16, n_heads=2, n_layers=2)).eval()


def test_a_document_in_a_window_is_as_it_is_alone() -> None:
    """Two and three of them, the first without its beginning, and a mark right after a mark."""
    model = tiny_model()
    ids = torch.randint(0, 50256, (3, 24), generator=torch.Generator().manual_seed(2))
    for row, places in enumerate([[9], [5, 14], [3, 4, 23]]):
        ids[row, places] = END_OF_TEXT_ID
    documents = (ids == END_OF_TEXT_ID).cumsum(dim=1)
    together = model(ids, documents=documents)
    for row, bounds in enumerate([[0, 9, 24], [0, 5, 14, 24], [0, 3, 4, 23, 24]]):
        for begin, end in itertools.pairwise(bounds):
            alone = model(ids[row : row + 1, begin:end])[0]
            torch.testing.assert_close(together[row, begin:end], alone, atol=1e-5, rtol=1e-5)
    assert (together - model(ids))[:, -1].abs().max() > 1e-2  # without boundaries it is otherwise
    one = torch.zeros_like(ids)
    torch.testing.assert_close(model(ids, documents=one), model(ids), atol=1e-5, rtol=1e-5)


def test_no_gradient_crosses_a_boundary() -> None:
    model = tiny_model()
    ids = torch.arange(100, 124)[None]
    ids[0, 10] = END_OF_TEXT_ID
    documents = (ids == END_OF_TEXT_ID).cumsum(dim=1)
    weights = torch.randn(16, generator=torch.Generator().manual_seed(3))
    (model.features(ids, documents=documents)[0, 10:] @ weights).sum().backward()
    assert model.tok_emb.weight.grad is not None
    moved = model.tok_emb.weight.grad.abs().sum(dim=1)
    assert torch.all(moved[100:110] == 0)
    assert torch.all(moved[111:124] > 0)


def test_documents_in_training_and_validation(
    fit: Command, command: Command, tmp_path: Path
) -> None:
    words = [f"The {i}th bell rang over the harbour at noon. " for i in range(120)]
    (tmp_path / "my.txt").write_text("".join(
        END_OF_TEXT * (i % 3 == 0) + word for i, word in enumerate(words)
    ))  # fmt: skip
    own = ("--data.text=my.txt", "--data.train_ratio=0.5", "--data.stride=16")

    def validation_loss(*arguments: str) -> float:
        done = command("validate", "--config=checkpoints/quickstart/config.yaml", "--json",
                       "--ckpt_path=last", *arguments)  # fmt: skip
        return float(json.loads(done.out)["val_loss"])

    fit(*BARE, *own, "--data.document_mask=true", "--trainer.max_steps=4", "--model.lr=0.01",
        "--model.loss_chunk_size=7", "--model.activation_checkpointing=true")  # fmt: skip
    # by hand, over the same windows
    data = data_on(1, 0, 16, text="my.txt", train_ratio=0.5, stride=16, document_mask=True)
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


# mixtures


def test_a_mixture_draws_by_weight_and_sees_all_of_a_source_in_turn() -> None:
    counts, shares = [5, 700, 40], [0.2, 0.5, 0.3]
    mixture = MixtureSampler(counts, [2, 5, 3], seed=4)
    places = np.arange(3 * 65536 + 1000)
    drawn = mixture(places)
    sources = np.searchsorted(np.cumsum(counts), drawn, side="right")
    for k, (count, share) in enumerate(zip(counts, shares, strict=True)):
        # of any stretch each source has its share, to two windows
        so_far = np.cumsum(sources == k)
        assert np.abs(so_far - share * (places + 1)).max() < 2.0 + 1e-4 * 3
        own = drawn[sources == k] - sum(counts[:k])
        whole = own[: len(own) // count * count].reshape(-1, count)
        assert np.array_equal(np.sort(whole, axis=1), np.tile(np.arange(count), (len(whole), 1)))
        assert not np.array_equal(whole[0], whole[1])
    # of each place alone, far away too
    some = np.random.default_rng(0).permutation(places)[:300]
    assert np.array_equal(MixtureSampler(counts, [0.2, 0.5, 0.3], seed=4)(some), drawn[some])
    assert not np.array_equal(MixtureSampler(counts, [2, 5, 3], seed=5)(places), drawn)
    far = np.arange(10**14, 10**14 + 50)
    assert np.array_equal(mixture(far)[10:20], mixture(far[10:20]))


def test_a_mixtures_shares_are_to_the_nearest() -> None:
    rng = np.random.default_rng(1)
    for n in (1, 2, 7, 300):
        weights = rng.random(n) ** 8 + 1e-9
        mixture = MixtureSampler([3] * n, weights.tolist(), seed=0)
        assert sum(mixture.shares) == 65536
        assert min(mixture.shares) >= 1
        off = np.array(mixture.shares) - np.array(mixture.weights) * 65536
        assert np.abs(off).max() <= max(1.0, np.sum(np.array(mixture.shares) == 1))


def test_windows_of_a_mixture_are_of_one_source() -> None:
    ones, twos = (np.full(n, n, dtype=np.uint16) for n in (50, 83))
    joined = ConcatWindowDataset([WindowDataset([ones], 8, 8), WindowDataset([twos], 8, 8)])
    assert joined.shape == (6 + 10, 9)
    drawn = joined.read(np.array([15, 0, 5, 6]))
    assert (drawn == np.array([83, 50, 50, 83])[:, None]).all()


def test_a_mixture_goes_on_where_it_was_cut() -> None:
    """In the middle of its second epoch, in batches of another size; its stream runs on through epochs."""
    counts = [7, 30]

    def loader(batch_size: int, accumulate: int) -> ResumableDataLoader:
        sources = [WindowDataset([some_tokens(8 * n + 1)], 8, 8) for n in counts]
        return ResumableDataLoader(
            ConcatWindowDataset(sources), batch_size, shuffle=True, drop_last=True, accumulate=accumulate,
            whole_steps=True, mixture=MixtureSampler(counts, [1, 1], 3),
        )  # fmt: skip

    expected = flat(numbers(loader(4, 2), 3))
    assert expected == MixtureSampler(counts, [1, 1], 3)(np.arange(3 * 32)).tolist()
    cut = loader(4, 2)
    numbers(cut)
    for _ in zip(range(2), cut, strict=False):
        pass
    resumed = loader(2, 4)
    resumed.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert flat(numbers(resumed, 2)) == expected[40:]


def test_a_mixture_through_the_command(fit: Command, command: Command, tmp_path: Path) -> None:
    """Resumed to the same bits; validation is over the windows of both."""
    (tmp_path / "my.txt").write_text("".join(f"Line {i} of a list of lines. " for i in range(200)))
    mixed = (
        *BARE,
        '--data.mixture={"sample": 0.25, "my.txt": 0.75}',
        "--data.document_mask=true",
    )
    fit(*mixed, "--run=straight", "--trainer.max_steps=9", "--data.global_batch_size=8")
    fit(*mixed, "--run=cut", "--trainer.max_steps=5", "--data.global_batch_size=8")
    fit(*mixed, "--run=cut", "--trainer.max_steps=9", "--data.global_batch_size=8", "--ckpt_path=last")  # fmt: skip
    assert same_bits("cut", "straight")

    def validate(*arguments: str) -> dict[str, float]:
        done = command("validate", "--config=checkpoints/cut/config.yaml", "--json",
                       "--ckpt_path=last", *arguments)  # fmt: skip
        return dict(json.loads(done.out))

    both = validate()
    alone = [validate("--data.mixture=null", f"--data.text={text}") for text in ("sample", "my.txt")]  # fmt: skip
    for split in ("train", "val"):
        tokens = [one[f"{split}_tokens"] for one in alone]
        assert both[f"{split}_tokens"] == sum(tokens)
        total = sum(one[f"{split}_loss"] * n for one, n in zip(alone, tokens, strict=True))
        assert both[f"{split}_loss"] == pytest.approx(total / sum(tokens), abs=1e-6)


# uneven


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_rank_gets_as_many_batches_and_no_window_comes_twice(
    world_size: int, batch_size: int
) -> None:
    """Also where the last batch has nothing for a rank, or there are more ranks than windows."""
    for n in (1, 2, 7, 16, 17):
        windows = WindowDataset([some_tokens(4 * n + 1)], 4, 4)
        of_ranks = [
            numbers(ResumableDataLoader(windows, batch_size, shuffle=False, drop_last=False, rank=rank,
                                 world_size=world_size))
            for rank in range(world_size)
        ]  # fmt: skip
        assert len({len(batches) for batches in of_ranks}) == 1
        assert sorted(flat([flat(batches) for batches in of_ranks])) == list(range(n))


def test_an_empty_batch_weighs_nothing() -> None:
    mean = TokenWeightedLoss()
    mean.update(torch.tensor(2.0), 3, 5)
    mean.update(torch.tensor(math.nan), 0, 0)
    assert float(mean.compute()["loss"]) == 2.0
    model, nothing = tiny_model(), torch.zeros((0, 8), dtype=torch.int64)
    assert model(nothing, documents=nothing).shape == (0, 8, 50257)
    assert model(nothing).shape == (0, 8, 50257)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
def test_two_processes_validate_uneven_windows(
    fit: Command, tmp_path: Path, batch_size: int
) -> None:
    """15 windows: at the end one rank has a batch less, or a shorter one. The losses of one, and nothing hangs."""
    fit("--trainer.max_steps=2")
    validate = ("-m", "gpt_lightning", "validate", "--config=checkpoints/quickstart/config.yaml",
                "--ckpt_path=last", "--json", f"--data.batch_size={batch_size}")  # fmt: skip
    two = python(*validate, "--trainer.devices=2", "--trainer.strategy=ddp", cwd=tmp_path, timeout=100)  # fmt: skip
    one = python(*validate, cwd=tmp_path, timeout=100)
    assert two.returncode == one.returncode == 0, two.stderr
    results = [json.loads(done.stdout) for done in (one, two)]
    assert results[0]["train_tokens"] == 15 * 16
    assert results[1] == pytest.approx(results[0], abs=1e-6)


SHARDED = """
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from gpt_lightning import GPTConfig, GPTModel

dist.init_process_group("gloo")
torch.manual_seed(1)
model = GPTModel(GPTConfig(context_length=8, emb_dim=16, n_heads=2, n_layers=2, vocab_size=64)).eval()
ids = torch.arange(16).view(2, 8)
expected = model(ids)
for block in model.trf_blocks:
    fully_shard(block)
fully_shard(model)
mine = ids if dist.get_rank() == 0 else ids[:0]
with torch.no_grad():
    found = model(mine)
torch.testing.assert_close(found, expected[: len(mine)])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_rank_without_windows_takes_part_in_sharded_work(tmp_path: Path) -> None:
    """FSDP2 gathers each block's weights from all ranks: one that had no batch would leave the other waiting."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = python(*launch, "sharded.py", cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_as_one(fit: Command, tmp_path: Path) -> None:
    """At an equal global batch of 4, cut in mid-epoch: two processes, then one; and evaluations between."""
    common = (*BARE, "--data.global_batch_size=4", "--data.batch_size=1", "--evaluation.eval_freq=1",
              "--evaluation.eval_iter=null")  # fmt: skip
    fit(*common, "--run=one", "--trainer.max_steps=7")
    done = python("-m", "gpt_lightning", "fit", QUICKSTART, *SMALL, *common, "--run=two",
                  "--trainer.max_steps=5", "--trainer.devices=2", "--trainer.strategy=ddp",
                  cwd=tmp_path, timeout=100)  # fmt: skip
    assert done.returncode == 0, done.stderr
    fit(*common, "--run=two", "--trainer.max_steps=7", "--ckpt_path=last")
    rows = [
        [row.split(",") for row in Path(f"checkpoints/{run}/metrics.csv").read_text().splitlines()]
        for run in ("one", "two")
    ]
    columns = [rows[0][0].index(name) for name in ("step", "train_loss", "val_loss", "tokens_seen")]
    figures = [[[float(row[i]) for i in columns] for row in run[1:]] for run in rows]
    assert len(figures[0]) == len(figures[1]) == 7
    for ours, theirs in zip(*figures, strict=True):
        assert theirs == pytest.approx(ours, abs=1e-5)


@pytest.mark.slow
def test_verify_resume_with_all_of_it(tmp_path: Path) -> None:
    done = python(
        "-m", "gpt_lightning", "verify-resume", QUICKSTART, *SMALL, "--steps=4", "--more_steps=3",
        "--data.global_batch_tokens=64", "--data.num_workers=2", "--data.document_mask=true",
        f'--data.mixture={{"sample": 1, "{__file__}": 2}}', "--data.train_ratio=0.5",
        "--max_tokens=100000000", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["exact"] is True


# mistakes


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--data.global_batch_size=0"], ["data.global_batch_size: 0 is too small"]),
        (
            ["--data.global_batch_size=5"],
            ["global_batch_size: 5 cannot be split over 1 device(s) with a batch_size of 2", "nearest that can is 6"],
        ),
        (
            ["--data.global_batch_size=7", "--trainer.devices=3", "--trainer.strategy=ddp", "--data.batch_size=1"],
            ["7 cannot be split over 3 device(s)", "is 6"],
        ),
        (["--data.global_batch_size=500"], ["500 is more than the 15 training windows"]),
        (["--data.global_batch_tokens=100"], ["100 is not a multiple of the window length, 16", "96"]),
        (["--data.global_batch_tokens=48"], ["global_batch_tokens: 48 cannot be split", "is 64"]),
        (["--data.global_batch_tokens=8000"], ["8000 is more than the 15 training windows of 16"]),
        (
            ["--data.global_batch_tokens=64", "--data.global_batch_size=4"],
            ["global_batch_size is given too"],
        ),
        (
            ["--data.global_batch_size=4", "--trainer.accumulate_grad_batches=3"],
            ["accumulate_grad_batches: 3 contradicts data.global_batch_size 4", "is 2 batches of 2"],
        ),
        (
            ["--trainer.devices=16", "--trainer.strategy=ddp"],
            ["trainer.devices: 16 are more than the 15 training windows"],
        ),
        (["--max_tokens=0"], ["max_tokens: 0 is too small"]),
        (["--data.mixture={}"], ["data.mixture: is empty"]),
        (["--data.mixture={sample: 0}"], ["data.mixture: sample has the weight 0"]),
        (["--data.mixture={sample: -1.5}"], ["sample has the weight -1.5"]),
        (["--data.mixture={sample: .nan}"], ["data.mixture.sample: nan is not a finite number"]),
        (["--data.mixture={sample: much}"], ["data.mixture", "much"]),
        (["--data.mixture={nowhere.txt: 1}"], ["nowhere.txt does not exist"]),
        (["--data.mixture={sample: 1}", "--rng=global"], ["data.mixture: the book's order"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("-") else "",
)  # fmt: skip
def test_mistakes(command: Command, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    refused(command("fit", QUICKSTART, *SMALL, "--trainer.max_steps=1", *arguments), *parts)
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_cut_between_other_updates_is_refused(fit: Command, command: Command) -> None:
    fit(*BARE, "--trainer.max_steps=3")
    done = command(
        "fit", QUICKSTART, *SMALL, *BARE, "--ckpt_path=last", "--data.global_batch_size=4"
    )
    refused(
        done,
        "cut after 6 windows of an epoch, which is not a multiple of 4 windows per optimizer step",
    )


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


def test_a_clip_of_0_clips_nothing(fit: Command) -> None:
    """As Lightning has it; a factor of 0 would stop the learning."""
    plain, clipped = (
        fit(f"--run={run}", "--trainer.max_steps=3", *arguments).out
        for run, arguments in [("plain", []), ("clipped", ["--trainer.gradient_clip_val=0"])]
    )
    assert plain == clipped
    assert same_bits("plain", "clipped")


def test_a_store_for_training_alone(fit: Command, command: Command, tmp_path: Path) -> None:
    """It can be a part of a mixture; alone it is refused, with the remedy that helps."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"{i} one two three " * 20}) for i in range(20)))
    assert command("prepare", str(rows), "--out=store", "--val_ratio=0").code == 0
    fit("--trainer.max_steps=1", '--data.mixture={"store": 0.5, "sample": 0.5}')
    done = command(
        "fit", f"--config={ROOT}/configs/quickstart.yaml", "--data.text=store", "--run=alone"
    )
    assert done.code == 2
    assert "prepare it again with more in that split (--val_ratio)" in done.err.splitlines()[-1]
    done = command(
        "fit",
        f"--config={ROOT}/configs/quickstart.yaml",
        '--data.mixture={"store": 1}',
        "--run=alone",
    )
    assert done.code == 2
    assert "none of its stores has a validation split" in done.err.splitlines()[-1]
