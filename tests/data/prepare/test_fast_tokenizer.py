"""prepare with the extra fast: the same store, whatever the other tokenizer does."""

import itertools
import json
import logging
import random
import sysconfig
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_lightning.data.prepare import fast_tokenizer, json_line, pipeline
from gpt_lightning.data.prepare.fast_tokenizer import FastTokenizer
from gpt_lightning.data.prepare.pipeline import PrepareConfig, prepare
from gpt_lightning.data.tokenizer import GPT2
from token_stores import SAMPLE, awkward_text, read_files, write_lines

SHARDS = PrepareConfig(shard_tokens=20_000)


class _StandIn:
    """tiktoken behind fastokens' interface, with an error in every ``every``-th token that can be split."""

    def __init__(self, every: int = 0) -> None:
        self.every, self.count = every, 0

    def encode_batch_flat(self, texts: Sequence[str]) -> tuple[bytes, bytes]:
        rows = [self._encode(text) for text in texts]
        bounds = np.cumsum([0, *map(len, rows)])
        return np.concatenate(rows).astype("<u4").tobytes(), bounds.astype("<u8").tobytes()

    def _encode(self, text: str) -> np.ndarray:
        ids = GPT2.encode_documents([text]).tolist()
        self.count += len(ids)
        if self.every and self.count >= self.every:  # the same bytes, in other tokens
            single = {token: i for i, token in enumerate(GPT2.token_bytes[:256])}
            at = next((i for i, each in enumerate(ids) if len(GPT2.token_bytes[each]) > 1), None)
            if at is not None:
                self.count = 0
                ids[at : at + 1] = [single[bytes([b])] for b in GPT2.token_bytes[ids[at]]]
        return np.array(ids)


class _Panic:
    def encode_batch_flat(self, texts: Sequence[str]) -> tuple[bytes, bytes]:
        raise BaseException("a panic of Rust")


class _Truncated:
    def encode_batch_flat(self, texts: Sequence[str]) -> tuple[bytes, bytes]:
        ids, bounds = _StandIn().encode_batch_flat(texts)
        return ids[:-4], bounds


class _WrongIds:
    def encode_batch_flat(self, texts: Sequence[str]) -> tuple[bytes, bytes]:
        ids, bounds = _StandIn().encode_batch_flat(texts)
        return bytes(len(ids)), bounds


class _WrongBytes:
    """As many bytes, but others."""

    def encode_batch_flat(self, texts: Sequence[str]) -> tuple[bytes, bytes]:
        return _StandIn().encode_batch_flat([text.swapcase() for text in texts])


class _OutOfRange:
    def __init__(self, token_id: int) -> None:
        self.token_id = token_id

    def encode_batch_flat(self, texts: Sequence[str]) -> tuple[bytes, bytes]:
        ids, bounds = _StandIn().encode_batch_flat(texts)
        return ids[:-4] + self.token_id.to_bytes(4, "little"), bounds


class _Joined:
    """A token reaches from one document into the next."""

    def encode_batch_flat(self, texts: Sequence[str]) -> tuple[bytes, bytes]:
        return _StandIn().encode_batch_flat(["".join(texts)])


class _Empty:
    def encode_batch_flat(self, texts: Sequence[str]) -> tuple[bytes, bytes]:
        return b"", b""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = random.Random(0)
    parts = SAMPLE.split("\n\n")
    texts = ["\n\n".join(rng.choices(parts, k=rng.choice([1, 3, 200]))) for _ in range(20)]
    texts += [awkward_text(rng, 2_000) for _ in range(20)]
    return str(write_lines(tmp_path_factory.mktemp("lines") / "a.jsonl", texts))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(pipeline, "_may_be_large", lambda _: True)

    def use(backend: Any) -> None:
        loading: Future[FastTokenizer | None] = Future()
        loading.set_result(None if backend is None else FastTokenizer(backend, "stand-in 1"))
        monkeypatch.setattr(pipeline, "load_in_background", lambda _: loading)

    return use


@pytest.fixture
def expected(use: Any, lines: str, tmp_path: Path) -> dict[str, bytes]:
    use(None)
    prepare([lines], tmp_path / "expected", SHARDS)
    return read_files(tmp_path / "expected")


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    "backend",
    [
        _StandIn(), _StandIn(30_000), _Panic(), _Truncated(), _WrongIds(), _WrongBytes(), _OutOfRange(50257),
        _OutOfRange(50256), _OutOfRange(2**32 - 1), _Joined(), _Empty(),
    ],
    ids=lambda backend: type(backend).__name__,
)  # fmt: skip
def test_store_is_that_of_tiktoken(
    use: Any,
    expected: dict[str, bytes],
    lines: str,
    tmp_path: Path,
    workers: int,
    backend: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use(backend)
    with caplog.at_level(logging.WARNING):
        prepare([lines], tmp_path / "out", SHARDS, workers=workers)
    assert read_files(tmp_path / "out") == expected
    is_right = isinstance(backend, _StandIn) and not backend.every
    assert bool(caplog.records) is not is_right
    places = [record.getMessage() for record in caplog.records]
    assert all("stand-in 1" in place and lines in place for place in places)


def test_wrong_ids_beyond_the_first_million_are_found_in_the_sample(
    use: Any, expected: dict[str, bytes], lines: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "CHECKED_TOKENS", 0)

    single = {token: i for i, token in enumerate(GPT2.token_bytes[:256])}
    of_byte = np.array([single[bytes([byte])] for byte in range(256)])
    broken = _StandIn()  # a token for each byte
    monkeypatch.setattr(
        broken, "_encode", lambda text: of_byte[np.frombuffer(text.encode(), np.uint8)]
    )
    use(broken)
    with caplog.at_level(logging.WARNING):
        prepare([lines], tmp_path / "out", SHARDS)
    assert caplog.records
    assert read_files(tmp_path / "out") == expected


@pytest.mark.parametrize("first_is_fast", [True, False])
def test_resumes_with_and_without_the_extra(
    use: Any, expected: dict[str, bytes], lines: str, tmp_path: Path, first_is_fast: bool
) -> None:
    backends = [_StandIn(), None] if first_is_fast else [None, _StandIn()]

    def interrupt(done: int, total: int, tokens: int) -> None:
        if tokens > 3 * SHARDS.shard_tokens:
            raise KeyboardInterrupt

    use(backends[0])
    with pytest.raises(KeyboardInterrupt):
        prepare([lines], tmp_path / "out", SHARDS, on_progress=interrupt)
    assert len(list((tmp_path / "out").glob("*.bin"))) > 1
    use(backends[1])
    prepare([lines], tmp_path / "out", SHARDS)
    assert read_files(tmp_path / "out") == expected


@pytest.mark.slow
def test_other_tokens_once_in_100_000_are_noticed(
    use: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [f"{i} {SAMPLE}" for i in range(60)])
    use(_StandIn(100_000))
    with caplog.at_level(logging.WARNING):
        prepare([str(path)], tmp_path / "out", SHARDS)
    use(None)
    prepare([str(path)], tmp_path / "expected", SHARDS)
    assert caplog.records
    assert read_files(tmp_path / "out") == read_files(tmp_path / "expected")


def test_sample_is_more_than_one_percent() -> None:
    contents = [
        SAMPLE * 100,
        "語" * 100_000,
        "a " * 2_000 + "x" * 900_000,
        SAMPLE * 20 + "語" * 100_000,
    ]
    for content in map(str.encode, contents):
        for offset in (0, 500, 12_345, 79_999):
            pieces = list(fast_tokenizer._sample(content, offset))
            assert sum(end - start for start, end in pieces) > 0.01 * len(content)
            assert pieces == sorted(pieces)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(pieces))


def test_missing_package_falls_back_and_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fast_tokenizer, "PACKAGE", "no_such_package")
    fast_tokenizer._package.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert fast_tokenizer.load_in_background(GPT2) is None
            assert fast_tokenizer.load_in_background(GPT2) is None
    finally:
        fast_tokenizer._package.cache_clear()
    (record,) = caplog.records
    assert "gpt-lightning[fast]" in record.getMessage()


def test_broken_package_falls_back_and_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('bad binary')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fast_tokenizer, "PACKAGE", "broken_package")
    fast_tokenizer._package.cache_clear()
    try:
        assert fast_tokenizer.load_in_background(GPT2) is None
    finally:
        fast_tokenizer._package.cache_clear()
    (record,) = caplog.records
    assert "cannot be used (bad binary)" in record.getMessage()


def test_package_that_fails_later_falls_back_and_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lines: str, tmp_path: Path
) -> None:
    (tmp_path / "other_package.py").write_text("class Tokenizer: pass")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fast_tokenizer, "PACKAGE", "other_package")
    monkeypatch.setattr(pipeline, "_may_be_large", lambda _: True)
    for cached in (fast_tokenizer._package, fast_tokenizer._gpt2):
        cached.cache_clear()
    try:
        prepare([lines], tmp_path / "out", SHARDS, workers=2)
    finally:
        for cached in (fast_tokenizer._package, fast_tokenizer._gpt2):
            cached.cache_clear()
    (record,) = caplog.records
    assert "other_package: cannot be used (" in record.getMessage()


class _OneOtherLetter:
    def encode_batch_flat(self, texts: Sequence[str]) -> tuple[bytes, bytes]:
        return _StandIn().encode_batch_flat(
            [text[:-9] + text[-9].swapcase() + text[-8:] for text in texts]
        )


@pytest.mark.parametrize(
    ("backend", "cause"),
    [
        (_OneOtherLetter(), "do not spell the text"), (_Truncated(), "do not spell the text"),
        (_Empty(), "do not spell the text"), (_Joined(), "reaches into the next document"),
        (_OutOfRange(50256), "an id is not one of text"), (_OutOfRange(50257), "an id is not one of text"),
        (_OutOfRange(2**32 - 1), "an id is not one of text"), (_Panic(), "it fails"), (_StandIn(50), "not those of tiktoken"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_checks_find_what_the_sample_does_not_see(backend: Any, cause: str) -> None:
    """tiktoken encodes the first thousand bytes of these texts; what is wrong comes later, but for the last backend."""
    texts = [SAMPLE[:20_000] + " th", "e end. " + SAMPLE[:20_000] + " letters"]
    with pytest.raises(fast_tokenizer.DifferenceError, match=cause):
        _ids(FastTokenizer(backend, "stand-in 1"), texts)
    found = _ids(FastTokenizer(_StandIn(), "stand-in 1"), texts)
    assert np.array_equal(found, GPT2.encode_documents(texts))


# --- the package itself ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fast() -> FastTokenizer:
    pytest.importorskip("fastokens")
    loading = fast_tokenizer.load_in_background(GPT2)
    assert loading is not None
    found = loading.result()
    assert found is not None
    return found


def _ids(fast: FastTokenizer, texts: list[str]) -> np.ndarray:
    return fast.encode_documents(texts, [text.encode() for text in texts])


def _assert_same(fast: FastTokenizer, texts: list[str]) -> None:
    ids = _ids(fast, texts)
    np.testing.assert_array_equal(ids, GPT2.encode_documents(texts))


def test_ids_of_source_files(fast: FastTokenizer) -> None:
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sources]
    assert len(texts) > 100
    _assert_same(fast, [text for text in texts if text])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=20))
def test_ids_of_any_text(fast: FastTokenizer, texts: list[str]) -> None:
    _assert_same(fast, texts)


def test_ids_of_awkward_text(fast: FastTokenizer) -> None:
    rng = random.Random(1)
    _assert_same(fast, [awkward_text(rng, 300) for _ in range(500)])
    _assert_same(fast, ["a<|endoftext|>b", "\U00032c88\u8af2", " " * 60_000, "x" * 100_000])


@pytest.mark.slow
def test_ids_of_20_000_random_strings_and_62_awkward_corpora(fast: FastTokenizer) -> None:
    rng = random.Random(2)
    scripts = [
        range(32, 127),
        range(0x250),
        range(0x3000, 0xA000),
        [*range(0xD800), *range(0xE000, 0x110000)],
    ]
    for _ in range(200):
        _assert_same(fast, ["".join(map(chr, rng.choices(rng.choice(scripts), k=rng.randint(1, 80))))
                            for _ in range(100)])  # fmt: skip
    for seed in range(62):
        _assert_same(fast, [awkward_text(random.Random(seed), 2_000)])


def test_too_many_blanks_are_refused_as_without_it(fast: FastTokenizer) -> None:
    with pytest.raises(ValueError, match="blanks in a row"):
        _ids(fast, ["a", "b" + " " * 3_000_000 + "c"])


# --- lines of JSON --------------------------------------------------------------------------------

AWKWARD = [
    b'{"text": NaN}', b'{"text": "a", "n": Infinity}', b'{"text": "a", "text": "b"}', b'{"text": "\\ud800"}',
    b'{"text": "\\ud83d\\ude00"}', b'{"a": 99999999999999999999999, "text": "x"}', b"\xef\xbb\xbf{}",
    b'{"a": ' + b"9" * 5000 + b', "text": "x"}', b'{"a": 0.' + b"9" * 9000 + b', "text": "x"}',
    b'{"a": ' + b"[" * 995 + b"]" * 995 + b', "text": "x"}', b'{"text": "\xff"}', b'{"text": "\xed\xa0\x80"}',
    b'{"text": "a\x01"}', b'{"text": "\\u0000"}', b"{'text': 1}", b'{"text": "a"} ', b'\t{"text": "a"}\r',
    b'{"text": "a"}\x0c', b'{"text": "a",}', b'{"a": 1e999, "text": "x"}', b'{"a": -0, "text": "x"}', b"[]", b"1",
    b'{"text": "\\ud800", "text": "b"}', b'{"text": "\xe2\x80\xa8\xef\xbb\xbf"}', b'{"text": "a", "b": 01}',
]  # fmt: skip


@pytest.mark.parametrize("line", AWKWARD)
def test_lines_are_read_as_json_reads_them(line: bytes) -> None:
    value = json_line.parse_line(line)
    if value is not None:
        text = json.loads(line.decode())
        assert type(value) is type(text)
        if isinstance(value, dict):
            assert value.get("text") == text.get("text")


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.booleans(),
)
def test_any_value_has_the_text_that_json_reads(value: Any, ascii_only: bool) -> None:
    line = json.dumps({"text": "\u2028 é", "value": value}, ensure_ascii=ascii_only)
    parsed = json_line.parse_line(line.encode(errors="surrogatepass"))
    assert parsed is None or parsed["text"] == json.loads(line)["text"]


def test_bad_lines_give_the_same_problems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*AWKWARD, b'{"text": "good"}']) + b"\n")
    config = PrepareConfig(val_ratio=0.0)
    one = prepare([str(path)], tmp_path / "one", config, skip=True)
    monkeypatch.setattr(json_line, "_orjson_loads", lambda: None)
    other = prepare([str(path)], tmp_path / "other", config, skip=True)
    assert one.problems == other.problems
    assert read_files(tmp_path / "one") == read_files(tmp_path / "other")
