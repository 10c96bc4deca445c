"""Pieces of sources to token ids: what a thread of ``prepare`` does."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.data.prepare.chunk import EOT_BYTES, Split, TextChunk, content_hash, split_of
from gpt_lightning.data.prepare.rows import as_python
from gpt_lightning.data.tokenizer import encode_documents
from gpt_lightning.data.unicode import BOM, clean_text, decoding_problem, line_ends


class TokenRun(NamedTuple):
    """Documents that follow one another in a split, or part of one; ``begins``: not the rest of one."""

    split: Split
    ids: NDArray[np.uint16]
    documents: int
    begins: bool


@dataclass
class EncodedChunk:
    """What became of a piece.

    Attributes:
        problems: One line for each document that was left out because it cannot be read.
        empty: Rows that hold nothing but white space, and are left out too.
    """

    tokens: list[TokenRun] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    empty: int = 0


class _Text(NamedTuple):
    place: str  # for a message
    offset: int
    text: str


class _Problem(NamedTuple):
    message: str


def encode_chunk(piece: TextChunk, *, name: str, val_ratio: float, skip: bool) -> EncodedChunk:
    """A piece's token ids by split.

    Args:
        name: The JSON field that holds a line's text.
        skip: Whether a document that cannot be read is counted instead of raised.

    Raises:
        ValueError: A document cannot be read.
    """
    encoded = EncodedChunk()
    if piece.part:
        assert piece.split is not None
        try:
            ids = encode_documents([_plain(piece.content, piece.at.offset)])
        except ValueError as error:
            place = f"{piece.source.path}, from byte {piece.at.offset}"
            raise ValueError(f"{place}: {error}") from error
        encoded.tokens.append(TokenRun(piece.split, ids, int(piece.begins), piece.begins))
        return encoded
    texts: dict[Split, list[_Text]] = {"train": [], "val": []}
    problems: list[_Problem] = []
    for document in _documents(piece, name):
        if isinstance(document, _Problem):
            if not skip:
                raise ValueError(document.message)
            problems.append(document)
        elif document.text.strip():
            texts[_split(piece, document, val_ratio)].append(document)
        elif piece.source.kind != "text":  # where nothing follows a mark, nothing is missed
            encoded.empty += 1
    for split, own in texts.items():
        ids, of, refused = _tokenised(own)
        if refused and not skip:
            raise ValueError(refused[0].message)
        problems += refused
        if of:
            encoded.tokens.append(TokenRun(split, ids, of, True))
    encoded.problems = [problem.message for problem in problems]
    return encoded


def _tokenised(texts: list[_Text]) -> tuple[NDArray[np.uint16], int, list[_Problem]]:
    """Their ids, of how many they are, and those that the tokenizer does not take."""
    refused = []
    try:
        return encode_documents([text.text for text in texts]), len(texts), []
    except ValueError:
        kept = []
        for text in texts:
            try:
                encode_documents([text.text])
                kept.append(text.text)
            except ValueError as error:
                refused.append(_Problem(f"{text.place}: {error}"))
    return encode_documents(kept), len(kept), refused


def _split(piece: TextChunk, document: _Text, val_ratio: float) -> Split:
    if piece.split is not None:
        return piece.split
    until = piece.source.train_until
    if until is not None:
        return "train" if document.offset < until else "val"
    return split_of(content_hash(document.text.encode()), val_ratio)


def _plain(content: bytes, offset: int) -> str:
    """Text from ``offset`` of a plain text file, as :func:`decode_text` reads the whole: the mark is at 0."""
    text = content.decode()
    return clean_text(text) if offset == 0 else line_ends(text)


def _documents(piece: TextChunk, name: str) -> Iterator[_Text | _Problem]:
    path = piece.source.path
    if piece.problem is not None:
        yield _Problem(f"{path}: {piece.problem}")
    elif piece.source.kind == "text":
        offset = piece.at.offset
        for content in piece.content.split(EOT_BYTES):
            try:
                yield _Text(str(path), offset, _plain(content, offset))
            except UnicodeDecodeError as error:
                problem = decoding_problem(error, offset + error.start)
                yield _Problem(f"{path}: {problem}; convert it to UTF-8")
            offset += len(content) + len(EOT_BYTES)
    elif piece.source.kind == "lines":
        offset = piece.at.offset
        for number, line in enumerate(piece.content.split(b"\n"), piece.at.line + 1):
            if line.strip():
                yield _of_line(f"{path}, line {number}", offset, line, name)
            offset += len(line) + 1
    else:
        for row, text in enumerate(as_python(piece.content), piece.at.offset):
            yield _of_text(f"{path}, row {row + 1}", row, text, name)


def _of_line(place: str, offset: int, line: bytes, name: str) -> _Text | _Problem:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        problem = decoding_problem(error, offset + error.start)
        return _Problem(f"{place}: {problem}; correct it, or --on_error skip")
    try:
        content = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return _Problem(f"{place}: is no JSON; correct it, or --on_error skip")
    if not isinstance(content, dict):
        return _Problem(f"{place}: is no JSON object; correct it, or --on_error skip")
    if name not in content:
        return _Problem(
            f"{place}: lacks the field {name}; name the text's with --field, or --on_error skip"
        )
    return _of_text(place, offset, content[name], name)


def _of_text(place: str, offset: int, text: object, name: str) -> _Text | _Problem:
    """A row's text. Its line ends are data, but a byte order mark is left from the file it came from."""
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            problem = decoding_problem(error)
            return _Problem(f"{place}: {problem}; correct it, or --on_error skip")
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        return _Problem(f"{place}: {name} is {kind} and no text; correct it, or --on_error skip")
    try:
        text.encode()
    except UnicodeEncodeError:
        return _Problem(
            f"{place}: {name} holds half a surrogate pair; correct it, or --on_error skip"
        )
    return _Text(place, offset, text.removeprefix(BOM))
