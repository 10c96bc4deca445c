"""Converts chunks to token ids in a thread of ``prepare``: parses rows of JSON, then tokenizes their texts."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from gpt_lightning.data.prepare.chunk import EOT_BYTES, Split, TextChunk, content_hash, split_of
from gpt_lightning.data.prepare.clean import Cleaning
from gpt_lightning.data.prepare.fast_tokenizer import DifferenceError, FastTokenizer
from gpt_lightning.data.prepare.json_line import parse_line, parse_text
from gpt_lightning.data.prepare.rows import as_python
from gpt_lightning.data.tokenizer import GPT2, Ids, Tokenizer
from gpt_lightning.data.unicode import BOM, clean_text, decoding_problem, line_ends

_BEFORE_SPACE = re.compile(r"\S(?=\s)")  # where a text may be cut
# kinds of cleaning that are counted
STRIPPED = "header_or_footer_removed"
DECODED_BY_FALLBACK = "decoded_by_fallback"
TOO_LITTLE_ASCII = "too_little_ascii"
NOT_THE_TOKENIZERS = "its ids are not those of tiktoken"


class TokenRun(NamedTuple):
    """Token ids of successive documents of a split, or of part of one; ``begins`` is False for the rest of one."""

    split: Split
    ids: Ids
    documents: int
    begins: bool


@dataclass
class EncodedChunk:
    """Result of a chunk.

    Attributes:
        problems: One line for each document that cannot be read and was left out.
        empty: Number of rows with nothing but white space, which are left out too.
        cleaned: Number of cleaned documents by kind of cleaning.
        difference: What is wrong with the fast tokenizer's ids, which are not to be used.
        unsampled_difference: The same, of a comparison of all ids. It counts in the first tokens of a store, so that
            the store does not depend on how many chunks are in progress.
    """

    tokens: list[TokenRun] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    empty: int = 0
    cleaned: Counter[str] = field(default_factory=Counter)
    difference: str | None = None
    unsampled_difference: str | None = None


class _Text(NamedTuple):
    location: str  # for a message
    offset: int
    text: str
    is_decoded_by_fallback: bool = False
    bytes: int = 0  # in a plain text


class _Problem(NamedTuple):
    message: str


def encode_chunk(
    chunk: TextChunk,
    *,
    name: str,
    val_ratio: float,
    skip: bool,
    cleaning: Cleaning,
    tokenizer: Tokenizer = GPT2,
    fast: Future[FastTokenizer | None] | None = None,
    compare_all: bool = False,
) -> EncodedChunk:
    """Token ids of a chunk by split.

    Args:
        name: The JSON field that holds a line's text.
        skip: Whether a document that cannot be read is counted instead of raised.
        fast: Encodes instead of ``tokenizer``, with checks.
        compare_all: Whether all its ids are compared with the tokenizer's.

    Raises:
        ValueError: A document cannot be read.
    """
    encoder = _Encoder(tokenizer, fast, compare_all)
    try:
        encoded = _encoded(chunk, encoder, name, val_ratio, skip, cleaning)
    except DifferenceError as error:
        return EncodedChunk(difference=str(error))
    encoded.unsampled_difference = encoder.difference
    return encoded


@dataclass
class _Encoder:
    """Token ids by the fast tokenizer if there is one, and what :func:`encode_chunk` compares."""

    tokenizer: Tokenizer
    fast: Future[FastTokenizer | None] | None
    compare_all: bool
    difference: str | None = None

    def encode(self, texts: Sequence[str], contents: Sequence[bytes]) -> Ids:
        """Token ids of documents with one delimiter between them; ``contents`` is their UTF-8 for the fast tokenizer."""
        if self.fast is None:
            return self.tokenizer.encode_documents(texts)
        # first, because the fast tokenizer may still be loading
        expected = self.tokenizer.encode_documents(texts) if self.compare_all else None
        fast = self.fast.result()
        if fast is None:
            return self.tokenizer.encode_documents(texts) if expected is None else expected
        ids = fast.encode_documents(texts, contents)
        if expected is not None and not np.array_equal(ids, expected):
            self.difference = NOT_THE_TOKENIZERS
        return ids


def _encoded(
    chunk: TextChunk,
    encoder: _Encoder,
    name: str,
    val_ratio: float,
    skip: bool,
    cleaning: Cleaning,
) -> EncodedChunk:
    encoded = EncodedChunk()
    if chunk.part:
        assert chunk.split is not None
        try:
            text = _plain(chunk.content, chunk.at.offset)
            ids = encoder.encode([text], [text.encode()])
        except ValueError as error:
            location = f"{chunk.source.path}, from byte {chunk.at.offset}"
            raise ValueError(f"{location}: {error}") from error
        encoded.tokens.append(TokenRun(chunk.split, ids, int(chunk.begins), chunk.begins))
        return encoded
    texts: dict[Split, list[_Text]] = {"train": [], "val": []}
    contents: dict[Split, list[bytes]] = {"train": [], "val": []}
    problems: list[_Problem] = []
    documents_of_chunk = _documents(chunk, name, cleaning)
    until = chunk.source.train_until if chunk.source.kind == "text" else None
    for document in _cleaned(documents_of_chunk, cleaning, encoded.cleaned, until):
        if isinstance(document, _Problem):
            if not skip:
                raise ValueError(document.message)
            problems.append(document)
        elif document.text.strip():
            content = document.text.encode()
            split = _split(chunk, document, content, val_ratio)
            texts[split].append(document)
            if encoder.fast is not None:
                contents[split].append(content)
        elif (
            chunk.source.kind != "text"
        ):  # two delimiters in a row in a plain text are not an empty row
            encoded.empty += 1
    for split, documents in texts.items():
        ids, count, refused = _tokenized(documents, contents[split], encoder)
        if refused and not skip:
            raise ValueError(refused[0].message)
        problems += refused
        if count:
            encoded.tokens.append(TokenRun(split, ids, count, True))
    encoded.problems = [problem.message for problem in problems]
    return encoded


def texts_of(chunk: TextChunk, name: str) -> Iterator[str]:
    """The texts of a chunk's documents, or of the part of one that it is.

    Args:
        name: The JSON field that holds a line's text.

    Raises:
        ValueError: A document cannot be read.
    """
    if chunk.part:
        yield _plain(chunk.content, chunk.at.offset)
        return
    for document in _documents(chunk, name, Cleaning()):
        if isinstance(document, _Problem):
            raise ValueError(document.message)
        yield document.text


def _cleaned(
    documents: Iterator[_Text | _Problem],
    cleaning: Cleaning,
    counts: Counter[str],
    until: int | None,
) -> Iterator[_Text | _Problem]:
    """The cleaned documents without those that are left out; ``counts`` is increased.

    Args:
        until: Where the training split ends; a plain text is cut there.
    """
    for document in documents:
        if isinstance(document, _Problem) or not cleaning.is_on:
            yield document
            continue
        counts[DECODED_BY_FALLBACK] += document.is_decoded_by_fallback
        text, was_stripped = cleaning.clean(document.text)
        if text is None:
            counts[TOO_LITTLE_ASCII] += 1
            continue
        counts[STRIPPED] += was_stripped
        if until is None or not document.offset < until < document.offset + document.bytes:
            yield document._replace(text=text)
            continue
        share = (until - document.offset) / document.bytes
        cut = _BEFORE_SPACE.search(text, int(share * len(text)))
        end = len(text) if cut is None else cut.end()
        yield document._replace(text=text[:end])
        yield document._replace(text=text[end:], offset=until)


def _tokenized(
    texts: list[_Text], contents: list[bytes], encoder: _Encoder
) -> tuple[Ids, int, list[_Problem]]:
    """Token ids, the number of texts they are of, and a problem for each text that the tokenizer refuses."""
    refused = []
    try:
        return encoder.encode([text.text for text in texts], contents), len(texts), []
    except ValueError:
        accepted = []
        for text in texts:
            try:
                encoder.tokenizer.encode_documents([text.text])
                accepted.append(text.text)
            except ValueError as error:
                refused.append(_Problem(f"{text.location}: {error}"))
    return encoder.tokenizer.encode_documents(accepted), len(accepted), refused


def _split(chunk: TextChunk, document: _Text, content: bytes, val_ratio: float) -> Split:
    if chunk.split is not None:
        return chunk.split
    until = chunk.source.train_until
    if until is not None:
        return "train" if document.offset < until else "val"
    return split_of(content_hash(content), val_ratio)


def _plain(content: bytes | str, offset: int) -> str:
    """Text from ``offset`` of a plain text file, as :func:`decode_text` reads it: a byte order mark is at 0."""
    text = content if isinstance(content, str) else content.decode()
    return clean_text(text) if offset == 0 else line_ends(text)


def _documents(chunk: TextChunk, name: str, cleaning: Cleaning) -> Iterator[_Text | _Problem]:
    path = chunk.source.path
    if chunk.problem is not None:
        yield _Problem(f"{path}: {chunk.problem}")
    elif chunk.source.kind == "text":
        offset = chunk.at.offset
        for content in chunk.content.split(EOT_BYTES):
            try:
                text, by_fallback = cleaning.decode(content)
                yield _Text(str(path), offset, _plain(text, offset), by_fallback, len(content))
            except UnicodeDecodeError as error:
                problem = decoding_problem(error, offset + error.start)
                yield _Problem(f"{path}: {problem}; convert it to UTF-8")
            offset += len(content) + len(EOT_BYTES)
    elif chunk.source.kind == "lines":
        offset = chunk.at.offset
        for number, line in enumerate(chunk.content.split(b"\n"), chunk.at.line + 1):
            if line.strip():
                yield _of_line(f"{path}, line {number}", offset, line, name, cleaning)
            offset += len(line) + 1
    else:
        for row, text in enumerate(as_python(chunk.content), chunk.at.offset):
            yield _of_text(f"{path}, row {row + 1}", row, text, name, cleaning)


def _of_line(
    location: str, offset: int, line: bytes, name: str, cleaning: Cleaning
) -> _Text | _Problem:
    content = parse_line(line)
    if isinstance(content, dict) and isinstance(document := content.get(name), str):
        return _Text(location, offset, document.removeprefix(BOM), False)
    try:
        text, by_fallback = cleaning.decode(line)
    except UnicodeDecodeError as error:
        problem = decoding_problem(error, offset + error.start)
        return _Problem(f"{location}: {problem}; correct it, or --on_error skip")
    try:
        content = parse_text(text)
    except (ValueError, RecursionError):
        return _Problem(f"{location}: is not JSON; correct it, or --on_error skip")
    if not isinstance(content, dict):
        return _Problem(f"{location}: is not a JSON object; correct it, or --on_error skip")
    if name not in content:
        return _Problem(
            f"{location}: lacks the field {name}; name the text's with --field, or --on_error skip"
        )
    document = _of_text(location, offset, content[name], name, cleaning)
    if isinstance(document, _Text):
        return document._replace(is_decoded_by_fallback=by_fallback)
    return document


def _of_text(
    location: str, offset: int, text: object, name: str, cleaning: Cleaning
) -> _Text | _Problem:
    """A row's text. Its line ends are data; a byte order mark is not, it comes from the file of origin."""
    by_fallback = False
    if isinstance(text, bytes):
        try:
            text, by_fallback = cleaning.decode(text)
        except UnicodeDecodeError as error:
            problem = decoding_problem(error)
            return _Problem(f"{location}: {problem}; correct it, or --on_error skip")
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        return _Problem(f"{location}: {name} is {kind}, not text; correct it, or --on_error skip")
    try:
        text.encode()
    except UnicodeEncodeError:
        return _Problem(
            f"{location}: {name} holds half a surrogate pair; correct it, or --on_error skip"
        )
    return _Text(location, offset, text.removeprefix(BOM), by_fallback)
