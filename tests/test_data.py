import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import book
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gpt_lightning.data.corpus import read_corpus
from gpt_lightning.data.dataloader import ResumableDataLoader
from gpt_lightning.data.dataset import WindowDataset
from gpt_lightning.data.tokenizer import decode, encode_corpus, encode_prompt, gpt2_encoding
from gpt_lightning.data.unicode import printable


def some_tokens(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 50257, n).astype(np.uint16)


def loader(n: int = 43, **settings: object) -> ResumableDataLoader:
    chosen = {"shuffle": True, "drop_last": True, **settings}
    return ResumableDataLoader(WindowDataset([some_tokens(n * 4 + 1)], 4, 4), 3, **chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [0, 1, 8, 9, 10, 57, 200])
@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize("stride", [1, 3, 8, 11])
def test_windows_are_the_books(n: int, length: int, stride: int) -> None:
    tokens = some_tokens(n)
    theirs = book.BookDataset(tokens.tolist(), length, stride)
    ours = WindowDataset([tokens], length, stride)
    assert ours.shape == (len(theirs), length + 1)
    drawn = ours.read(np.arange(len(ours)))
    for i, (inputs, targets) in enumerate(theirs[i] for i in range(len(theirs))):
        assert drawn[i, :-1].tolist() == inputs.tolist()
        assert drawn[i, 1:].tolist() == targets.tolist()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_global_order_is_that_of_a_dataloader(shuffle: bool, drop_last: bool) -> None:
    """The same batches, and torch's global generator left in the same state, pass after pass."""
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


def test_step_order_is_a_function_of_seed_and_epoch() -> None:
    def two_epochs(seed: int) -> list[list[list[int]]]:
        one = loader(seed=seed)
        torch.rand(3)  # the global generator has no say
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
def test_goes_on_where_it_was_cut(rng: str, cut: int) -> None:
    """Cut after ``cut`` of 14 batches of the second epoch: the rest of it and the third are the same."""
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


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("n", [24, 31])
def test_ranks_share_the_same_stream(world_size: int, n: int) -> None:
    def stream(rank: int, world: int) -> list[list[list[int]]]:
        data = WindowDataset([some_tokens(n * 4 + 1)], 4, 4)
        one = ResumableDataLoader(
            data, 8 // world, shuffle=True, drop_last=True, rank=rank, world_size=world
        )
        return [x.tolist() for x, _ in one]

    ranks = [stream(rank, world_size) for rank in range(world_size)]
    joined = [[row for part in parts for row in part] for parts in zip(*ranks, strict=True)]
    assert joined == stream(0, 1)


def test_a_pass_sees_every_window_once() -> None:
    one = loader(drop_last=False)
    seen = [tuple(row) for x, _ in one for row in x.tolist()]
    assert len(seen) == 43
    assert sorted(seen) == sorted(
        tuple(row) for row in one.windows.read(np.arange(43))[:, :-1].tolist()
    )


def test_tokenizer_is_gpt2s() -> None:
    assert gpt2_encoding().n_vocab == 50257
    assert encode_prompt("Every effort moves you") == [6109, 3626, 6100, 345]
    text = "Ünïcode, emoji 🦜, tabs\tand\n\nnewlines  with   spaces"
    assert decode(encode_prompt(text)) == text


def test_blanks_without_end_are_refused() -> None:
    """For which tiktoken's regular expression has no stack."""
    for encode in (encode_corpus, encode_prompt):
        with pytest.raises(
            ValueError, match="has more blanks in a row than the tokenizer can read"
        ):
            encode("a" + " " * 1_100_000 + "b")


def test_threads_share_no_encoding() -> None:
    """With one for all, two threads need up to 1.6 times the processor time of one: see its docstring."""
    with ThreadPoolExecutor(1) as pool:
        of_another = pool.submit(gpt2_encoding).result()
    assert gpt2_encoding() is gpt2_encoding() is not of_another
    assert of_another.encode("Every effort") == gpt2_encoding().encode("Every effort")


def test_end_of_text_is_a_mark_in_a_corpus_and_plain_text_in_a_prompt() -> None:
    text = "one<|endoftext|>two"
    assert encode_corpus(text).tolist().count(50256) == 1
    assert 50256 not in encode_prompt(text)
    assert encode_prompt(text, special=True).count(50256) == 1


def test_sample_is_a_story_of_its_own() -> None:
    text = read_corpus("sample")
    assert len(text) >= 20_000
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs) > 50


def test_folder_is_its_files_in_order(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.md").write_text("first", encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    assert read_corpus(str(tmp_path)) == "first<|endoftext|>second"


LINES = "One.\nTwo.\n\nThree, at the end.\n"


@pytest.mark.parametrize("name", ["file", "folder"])
@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + LINES.encode(),
        LINES.replace("\n", "\r\n").encode(),
        LINES.replace("\n", "\r").encode(),
        b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode(),
    ],
    ids=["BOM", "CRLF", "CR", "both"],
)
def test_byte_order_mark_and_line_ends_are_no_text(
    tmp_path: Path, content: bytes, name: str
) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    text = read_corpus(str(path if name == "file" else tmp_path))
    assert text == LINES
    assert encode_corpus(text).tolist() == encode_corpus(LINES).tolist()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(("\ufeff" * (encoding[-1] == "e") + LINES).encode(encoding))
    named = encoding[:6].upper()
    with pytest.raises(ValueError, match=f"a.txt is {named}, not UTF-8; convert it to UTF-8"):
        read_corpus(str(tmp_path))


def test_a_byte_order_mark_alone_is_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\r\n")
    with pytest.raises(ValueError, match="is empty"):
        read_corpus(str(tmp_path / "a.txt"))


def test_hidden_files_and_second_links_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "texts"
    for name in (".ipynb_checkpoints", ".git", "more"):
        (folder / name).mkdir(parents=True)
        (folder / name / "b.txt").write_text(f"in {name}")
    (folder / "._a.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    (folder / ".DS_Store").write_bytes(b"\xff")
    (folder / "a.txt").write_text("first")
    (folder / "c.txt").symlink_to("a.txt")
    (folder / "d.md").hardlink_to(folder / "a.txt")
    (folder / "e").symlink_to("more")
    assert read_corpus(str(folder)) == "first<|endoftext|>in more"
    assert read_corpus(str(folder)) == "first<|endoftext|>in more"
    (warning,) = caplog.messages
    hidden = "3 hidden files or folders (._a.txt, .git, .ipynb_checkpoints)"
    assert f"texts: left out: {hidden}, 2 links to files already read (c.txt, d.md)" in warning
    (tmp_path / ".texts").mkdir()  # what is named is read
    (tmp_path / ".texts" / "a.txt").write_text("named")
    (tmp_path / ".b.txt").write_text("named too")
    assert read_corpus(str(tmp_path / ".texts")) == "named"
    assert read_corpus(str(tmp_path / ".b.txt")) == "named too"
    assert caplog.messages == [warning]


def test_a_folder_that_cannot_be_read_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        read_corpus(str(tmp_path))


@pytest.mark.parametrize("text", ["caf\udce9", "\ud800"])
def test_lone_surrogates_are_no_blanks(text: str) -> None:
    for encode in (encode_corpus, encode_prompt):
        with pytest.raises(ValueError, match="is not valid UTF-8"):
            encode(text)


def test_surrogate_pairs_are_one_character() -> None:
    assert encode_prompt("\ud83e\udd9c") == encode_prompt("🦜")


def test_control_characters_are_escaped_for_a_terminal() -> None:
    assert printable("a\tb\n\x1b[31mred\x07\r\x7f\x9b\udce9ü🦜") == (
        "a\tb\n\\x1b[31mred\\x07\\r\\x7f\\x9b\\udce9ü🦜"
    )


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("rng", ["step", "global"])
def test_workers_read_the_same_batches(num_workers: int, rng: str) -> None:
    """Also those of a pass that is left early, and of one that is resumed."""

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
