"""The data loader: its order, ranks, workers, and resume at any batch."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import book
from gpt_lightning.data import dataloader as loader_module
from gpt_lightning.data.dataloader import ResumableDataLoader
from gpt_lightning.data.dataset import ConcatWindowDataset, WindowDataset
from gpt_lightning.data.sampler import MixtureSampler, shuffled
from helpers import flatten, some_tokens, window_numbers


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_global_order_equals_that_of_torchs_dataloader(shuffle: bool, drop_last: bool) -> None:
    """The batches are equal in each epoch, and so is the state of torch's global generator."""
    tokens = some_tokens(400)
    ours = ResumableDataLoader(
        WindowDataset([tokens], 8, 8), 4, shuffle=shuffle, drop_last=drop_last, rng="global"
    )
    theirs = DataLoader(
        book.BookDataset(tokens.tolist(), 8, 8), 4, shuffle=shuffle, drop_last=drop_last
    )
    torch.manual_seed(5)
    expected = [[x.tolist() for x, _ in theirs] for _ in range(3)]
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert [[x.tolist() for x, _ in ours] for _ in range(3)] == expected
    assert torch.equal(torch.get_rng_state(), state)


def loader(n: int = 43, **settings: object) -> ResumableDataLoader:
    chosen = {"shuffle": True, "drop_last": True, **settings}
    return ResumableDataLoader(WindowDataset([some_tokens(n * 4 + 1)], 4, 4), 3, **chosen)  # type: ignore[arg-type]


def test_step_order_is_a_function_of_seed_and_epoch() -> None:
    def two_epochs(seed: int) -> list[list[list[int]]]:
        one = loader(seed=seed)
        torch.rand(3)  # the global generator has no effect
        return [[x.tolist() for x, _ in one] for _ in range(2)]

    state = torch.get_rng_state()
    first = two_epochs(1)
    assert first == two_epochs(1)
    assert first != two_epochs(2)
    assert first[0] != first[1]
    torch.set_rng_state(state)
    list(loader(seed=1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rng", ["step", "global"])
@pytest.mark.parametrize("cut", [0, 1, 7, 13, 14])
def test_resumed_loader_gives_the_remaining_batches(rng: str, cut: int) -> None:
    """Stopped after ``cut`` of the 14 batches of the second epoch: its rest and the third epoch are equal."""
    torch.manual_seed(3)
    whole = loader(rng=rng)
    list(whole)
    second = iter(whole)
    seen = [next(second)[0].tolist() for _ in range(max(cut, 1))][:cut]
    if cut == 0:
        whole = loader(rng=rng)
        torch.manual_seed(3)
        list(whole)
    saved, random_numbers = whole.state_dict(), torch.get_rng_state()
    rest = [x.tolist() for x, _ in (second if cut else whole)]
    third = [x.tolist() for x, _ in whole]
    assert len(seen + rest) == 14

    resumed = loader(rng=rng)
    resumed.load_state_dict(saved)
    torch.set_rng_state(random_numbers)
    if cut < 14:
        assert [x.tolist() for x, _ in resumed] == rest
    assert [x.tolist() for x, _ in resumed] == third


@pytest.mark.parametrize("most", [10, 1000])
def test_resumed_loader_may_have_another_batch_size(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the order in memory and computed, and in later epochs."""
    monkeypatch.setattr(loader_module, "MAX_IN_MEMORY", most)

    def loader(batch_size: int) -> ResumableDataLoader:
        tokens = WindowDataset([some_tokens(4 * 24 + 1)], 4, 4)
        return ResumableDataLoader(tokens, batch_size, shuffle=True, drop_last=True, seed=5)

    whole = loader(4)
    expected = flatten(window_numbers(whole, 3))
    assert expected[:24] != expected[24:48]
    assert sorted(expected[:24]) == sorted(expected[24:48]) == list(range(24))
    cut = loader(4)
    window_numbers(cut)
    for _ in zip(range(3), cut, strict=False):
        pass
    resumed = loader(2)
    resumed.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert flatten(window_numbers(resumed, 2)) == expected[36:]


def test_saved_position_without_a_kind_of_order_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The epoch continues in the order in memory, with any number of windows."""
    monkeypatch.setattr(loader_module, "MAX_IN_MEMORY", 10)
    loader = ResumableDataLoader(
        WindowDataset([some_tokens(49)], 4, 4), 3, shuffle=True, drop_last=True
    )
    state = {"epoch": 1, "windows_seen": 6, "order_seed": 99}
    loader.load_state_dict(state)
    assert flatten(window_numbers(loader)) == shuffled(12, 99)(np.arange(6, 12)).tolist()
    assert flatten(window_numbers(loader)) != shuffled(12, loader.state_dict()["order_seed"])(np.arange(12)).tolist()  # fmt: skip


def test_resumed_mixture_gives_the_remaining_batches() -> None:
    """Within the second epoch, with another batch size; the mixture continues over epochs."""
    counts = [7, 30]

    def loader(batch_size: int, accumulate: int) -> ResumableDataLoader:
        sources = [WindowDataset([some_tokens(8 * n + 1)], 8, 8) for n in counts]
        return ResumableDataLoader(
            ConcatWindowDataset(sources), batch_size, shuffle=True, drop_last=True, accumulate=accumulate,
            whole_steps=True, mixture=MixtureSampler(counts, [1, 1], 3),
        )  # fmt: skip

    expected = flatten(window_numbers(loader(4, 2), 3))
    assert expected == MixtureSampler(counts, [1, 1], 3)(np.arange(3 * 32)).tolist()
    cut = loader(4, 2)
    window_numbers(cut)
    for _ in zip(range(2), cut, strict=False):
        pass
    resumed = loader(2, 4)
    resumed.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert flatten(window_numbers(resumed, 2)) == expected[40:]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("n", [24, 31])
def test_ranks_share_one_stream(world_size: int, n: int) -> None:
    def stream(rank: int, world: int) -> list[list[list[int]]]:
        data = WindowDataset([some_tokens(n * 4 + 1)], 4, 4)
        one = ResumableDataLoader(
            data, 8 // world, shuffle=True, drop_last=True, rank=rank, world_size=world
        )
        return [x.tolist() for x, _ in one]

    ranks = [stream(rank, world_size) for rank in range(world_size)]
    joined = [[row for part in parts for row in part] for parts in zip(*ranks, strict=True)]
    assert joined == stream(0, 1)


@pytest.mark.parametrize(("batch_size", "ranks"), [(2, 2), (5, 2), (3, 4), (7, 3)])
def test_ranks_read_equally_many_batches_and_each_window_once(batch_size: int, ranks: int) -> None:
    """The other ranks would wait for a rank with fewer batches."""
    view = WindowDataset([np.arange(60, dtype=np.uint16)], 4, 3)
    seen = []
    counts = set()
    for rank in range(ranks):
        loader = ResumableDataLoader(view, batch_size, shuffle=False, drop_last=False, rank=rank,
                              world_size=ranks)  # fmt: skip
        batches = list(loader)
        counts.add(len(batches))
        assert len(batches) == len(loader)
        assert all(inputs.shape[1] == 4 for inputs, _ in batches)
        seen += [int(row[0]) for inputs, _ in batches for row in inputs]
    assert len(counts) == 1
    assert sorted(seen) == view.read(np.arange(len(view)))[:, 0].tolist()


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_ranks_get_equally_many_batches_even_if_some_are_empty(
    world_size: int, batch_size: int
) -> None:
    """The last batch may be empty for a rank, and there may be more ranks than windows."""
    for n in (1, 2, 7, 16, 17):
        windows = WindowDataset([some_tokens(4 * n + 1)], 4, 4)
        of_ranks = [
            window_numbers(ResumableDataLoader(windows, batch_size, shuffle=False, drop_last=False, rank=rank,
                                 world_size=world_size))
            for rank in range(world_size)
        ]  # fmt: skip
        assert len({len(batches) for batches in of_ranks}) == 1
        assert sorted(flatten([flatten(batches) for batches in of_ranks])) == list(range(n))


def test_an_epoch_reads_every_window_once() -> None:
    one = loader(drop_last=False)
    seen = [tuple(row) for x, _ in one for row in x.tolist()]
    assert len(seen) == 43
    assert sorted(seen) == sorted(
        tuple(row) for row in one.windows.read(np.arange(43))[:, :-1].tolist()
    )


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("rng", ["step", "global"])
def test_workers_read_the_same_batches(num_workers: int, rng: str) -> None:
    """In complete, interrupted and resumed epochs."""

    def passes(workers: int) -> list[list[list[int]]]:
        torch.manual_seed(7)
        first = loader(rng=rng, num_workers=workers)
        seen = [[x.tolist() for x, _ in first], []]
        for x, _ in first:
            seen[1].append(x.tolist())
            if len(seen[1]) == 5:
                break
        resumed = loader(rng=rng, num_workers=workers)
        resumed.load_state_dict(first.state_dict())
        return [*seen, [x.tolist() for x, _ in resumed]]

    assert passes(num_workers) == passes(0)
