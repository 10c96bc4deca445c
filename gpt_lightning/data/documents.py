"""Sources to pieces of about a megabyte, in order, each of which a thread can tokenise by itself.

A plain text's documents are what lies between its ``<|endoftext|>``. A long one is cut where the tokens of
the parts are those of the whole: before white space that follows none. GPT-2's pattern lets no token reach
over such a place, and nothing before it depends on what comes after.
"""

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

from gpt_lightning.data.sources import (
    DamagedError,
    Source,
    checked,
    open_dataset,
    open_lines,
    open_parquet,
)
from gpt_lightning.data.tokenizer import END_OF_TEXT

PIECE_BYTES = 1 << 20
LONGEST = 1 << 25  # bytes of a line, or of a text without a place to cut
MARK = END_OF_TEXT.encode()
_LOOK = 1024  # bytes of a document that say whether it holds anything
_ROWS = 256  # read from a parquet file at a time

_BEFORE_SPACE = re.compile(rb"(?:[!-~]|[\xc2-\xf4][\x80-\xbf]{1,3})(?=[ \n\r])")

Split = Literal["train", "val"]


class Position(NamedTuple):
    """Where reading goes on: source, offset (uncompressed bytes) or row, lines before it, and the split of
    the document it is in the middle of."""

    source: int = 0
    offset: int = 0
    line: int = 0
    split: Split | None = None


@dataclass(frozen=True)
class Piece:
    """Whole documents, or part of a long one.

    Attributes:
        content: Bytes of a plain text or of lines; a list of rows, or Arrow's array of them.
        at: Where it begins.
        after: Where reading goes on after it.
        split: Where all of it goes; none: each document's content, or offset, decides.
        part: Of a long document; ``begins`` is the first of its parts.
        problem: Why the document cannot be read, in place of its content.
        done: Bytes on disk that were read up to here.
    """

    source: Source
    content: Any
    at: Position
    after: Position
    done: int
    split: Split | None = None
    part: bool = False
    begins: bool = True
    problem: str | None = None


def split_of(digest: bytes, val_ratio: float) -> Split:
    """The split of a document by the sum of its content: other documents have no say."""
    return "val" if int.from_bytes(digest, "big") < val_ratio * 2**64 else "train"


def content_hash(content: bytes) -> bytes:
    return blake2b(content, digest_size=8).digest()


def read_pieces(
    sources: Sequence[Source], start: Position, *, field: str, val_ratio: float
) -> Iterator[Piece]:
    """All pieces from ``start``. What is left of a damaged source is one, with a problem.

    Raises:
        ValueError, OSError: A source cannot be read, or has no ``field``.
    """
    before = sum(source.bytes for source in sources[: start.source])
    for number, source in enumerate(sources[start.source :], start.source):
        begin = start if number == start.source else Position(number)
        if source.kind == "text":
            pieces = _read_text(source, begin, before, val_ratio)
        elif source.kind == "lines":
            pieces = _read_lines(source, begin, before)
        elif source.kind == "parquet":
            pieces = _read_parquet(source, begin, before, field)
        else:
            pieces = _read_dataset(source, begin, before, field)
        try:
            yield from pieces
        except DamagedError as error:
            problem = str(error).removeprefix(f"{source.path}: ")
            after, done = Position(number + 1), before + source.bytes
            yield Piece(source, b"", Position(number), after, done, problem=problem)
        except OSError as error:
            raise OSError(
                f"{source.path}: cannot be read: {error.strerror or error}; check it"
            ) from error
        before += source.bytes


# --- plain text -----------------------------------------------------------------------------------


def _read_text(source: Source, begin: Position, before: int, val_ratio: float) -> Iterator[Piece]:
    number, offset, _, split = begin
    size = PIECE_BYTES
    with source.path.open("rb") as file:
        while offset < source.bytes:
            end, fixed = source.bytes, cast(Split | None, None)
            if source.train_until is not None:
                fixed = "train" if offset < source.train_until else "val"
                end = source.train_until if fixed == "train" else source.bytes
            file.seek(offset)
            data = file.read(min(size, end - offset))
            if not data:
                raise OSError("it became shorter while it was read")
            at = Position(number, offset, 0, split)
            last = offset + len(data) == end
            begins = split is None
            if begins and (last or MARK in data):
                whole = len(data) if last else data.rindex(MARK) + len(MARK)
                offset, size = offset + whole, PIECE_BYTES
                after = Position(number, offset)
                yield Piece(source, data[:whole], at, after, before + offset, fixed)
                continue
            if begins:
                digest, document_end, problem = _scan(file, offset, end)
                split = fixed or split_of(digest, val_ratio)
                if problem:
                    offset, split = document_end, None
                    after = Position(number, offset)
                    yield Piece(source, b"", at, after, before + offset, problem=problem)
                    continue
            if (found := data.find(MARK)) >= 0:
                cut, following = found, found + len(MARK)
            elif last:
                cut = following = len(data)
            elif cut := safe_cut(data):
                following = cut
            elif size < LONGEST:  # a long word
                size, split = 2 * size, at.split
                continue
            else:
                raise ValueError(
                    f"{source.path}: has no white space in {LONGEST >> 20} MB from byte {offset}; "
                    "leave it out if it is no text"
                )
            size = PIECE_BYTES
            own, offset = split, offset + following
            if found >= 0 or last:
                split = None
            after = Position(number, offset, 0, split)
            yield Piece(
                source, data[:cut], at, after, before + offset, own, part=True, begins=begins
            )


def safe_cut(text: bytes) -> int:
    """The last place where a text may be cut in two that are tokenised apart; 0: there is none."""
    for tail in (4096, 65536, len(text)):
        first = max(0, len(text) - tail)
        for match in reversed(list(_BEFORE_SPACE.finditer(text, first))):
            if not match[0].decode(errors="replace").isspace():
                return match.end()
        if first == 0:
            break
    return 0


def _scan(file: IO[bytes], offset: int, end: int) -> tuple[bytes, int, str | None]:
    """A long document's hash, where the next one begins, and whether it is no UTF-8."""
    digest, problem = blake2b(digest_size=8), None
    decoder = codecs.getincrementaldecoder("utf-8")()
    kept, done, following = b"", 0, end

    def take(block: bytes, final: bool) -> None:
        nonlocal done, problem
        digest.update(block)
        pending = len(decoder.getstate()[0])
        try:
            if problem is None:
                decoder.decode(block, final)
        except UnicodeDecodeError as error:
            at = offset + done - pending + error.start
            problem = f"is not UTF-8 (byte {at}: {error.reason}); convert it"
        done += len(block)

    file.seek(offset)
    place = offset
    while block := file.read(min(PIECE_BYTES, end - place)):
        place += len(block)
        block = kept + block
        if (found := block.find(MARK)) >= 0:
            following = offset + done + found + len(MARK)
            kept = block[:found]
            break
        keep = len(MARK) - 1
        take(block[:-keep], final=False)
        kept = block[-keep:]
    take(kept, final=True)
    return digest.digest(), following, problem


def document_hashes(sources: Sequence[Source]) -> Iterator[tuple[Path, bytes | None]]:
    """Of the documents of plain texts that are no mere white space; none of one that is no UTF-8."""
    for source in sources:
        offset = 0
        with source.path.open("rb") as file:
            while offset < source.bytes:
                digest, following, problem = _scan(file, offset, source.bytes)
                file.seek(offset)
                begin = file.read(min(_LOOK, following - offset)).split(MARK)[0]
                if begin.strip() or following - offset > _LOOK:
                    yield source.path, None if problem else digest
                offset = following


def text_cut(path: Path, at_least: int, size: int) -> int:
    """The first place from ``at_least`` where a plain text may be cut: before white space, or after a mark."""
    with path.open("rb") as file:
        start = max(0, at_least - len(MARK))
        file.seek(start)
        data = b""
        while True:
            block = file.read(PIECE_BYTES)
            data += block
            marks = (m.end() for m in re.finditer(re.escape(MARK), data))
            spaces = (
                m.end()
                for m in _BEFORE_SPACE.finditer(data)
                if not m[0].decode(errors="replace").isspace()
            )
            places = [next((p for p in found if start + p >= at_least), None)
                      for found in (marks, spaces)]  # fmt: skip
            if known := [start + place for place in places if place is not None]:
                return min(known)
            if not block or len(data) > LONGEST:
                return size


# --- rows -----------------------------------------------------------------------------------------


def _read_lines(source: Source, begin: Position, before: int) -> Iterator[Piece]:
    number, offset, line, _ = begin
    with open_lines(source.path) as (file, raw):
        if file is raw:
            raw.seek(offset)
        else:
            _skip(file, offset)
        rest = b""
        while True:
            block = file.read(PIECE_BYTES)
            data = rest + block
            whole = data.rfind(b"\n") + 1 if block else len(data)
            if not whole:
                if not block:
                    return
                if len(data) > LONGEST:
                    raise ValueError(
                        f"{source.path}, line {line + 1}: is longer than {LONGEST >> 20} MB; "
                        "give one JSON object a line"
                    )
                rest = data
                continue
            content, rest = data[:whole], data[whole:]
            at = Position(number, offset, line)
            offset, line = offset + whole, line + content.count(b"\n")
            after = Position(number, offset, line)
            yield Piece(source, content, at, after, before + raw.tell())


def _skip(file: IO[bytes], size: int) -> None:
    while size:
        found = len(file.read(min(size, PIECE_BYTES)))
        if not found:
            raise OSError("it became shorter while it was read")
        size -= found


def _read_parquet(source: Source, begin: Position, before: int, field: str) -> Iterator[Piece]:
    file = open_parquet(source.path)
    import pyarrow
    from pyarrow import types

    schema = file.schema_arrow
    if field not in schema.names:
        raise ValueError(_no_field(source, field, schema.names))
    kind = schema.field(field).type
    content = kind.value_type if types.is_dictionary(kind) else kind
    plain = types.is_string(kind) or types.is_large_string(kind)
    if not (
        types.is_string(content) or types.is_large_string(content) or types.is_string_view(content)
    ):
        raise ValueError(
            f"{source.path}: has no text {field}, but {kind}; name the text's with --field"
        )
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if first + rows > begin.offset:
            batches = file.iter_batches(_ROWS, [group], [field], use_threads=False)
            columns = (
                batch.column(0) if plain else batch.column(0).cast(pyarrow.large_string())
                for batch in checked(batches, source.path)
            )
            yield from _row_pieces(source, begin, before, file.metadata.num_rows, first, columns)
        first += rows


def _read_dataset(source: Source, begin: Position, before: int, field: str) -> Iterator[Piece]:
    dataset = open_dataset(source.path)
    if field not in dataset.column_names:
        raise ValueError(_no_field(source, field, dataset.column_names))
    first = begin.offset - begin.offset % _ROWS
    columns = (list(dataset[row : row + _ROWS][field]) for row in range(first, len(dataset), _ROWS))
    yield from _row_pieces(
        source, begin, before, len(dataset), first, checked(columns, source.path)
    )


def _row_pieces(
    source: Source,
    begin: Position,
    before: int,
    total: int,
    row: int,
    columns: Iterator[Any],
) -> Iterator[Piece]:
    """Pieces of the columns' rows, the first of which is ``row``, from where to begin."""
    for column in columns:
        skipped = max(0, min(len(column), begin.offset - row))
        column, row = column[skipped:], row + skipped
        size = (
            column.nbytes if hasattr(column, "nbytes") else sum(len(text or "") for text in column)
        )
        step = max(1, len(column) * PIECE_BYTES // max(size, 1))
        for i in range(0, len(column), step):
            rows = column[i : i + step]
            at, after = Position(begin.source, row), Position(begin.source, row + len(rows))
            row += len(rows)
            yield Piece(source, rows, at, after, before + source.bytes * row // total)


def _no_field(source: Source, field: str, names: Sequence[str]) -> str:
    return f"{source.path}: has no text {field} (but {', '.join(names)}); name it with --field"


# --- how much there is ----------------------------------------------------------------------------


def measure(source: Source, *, skip: bool) -> int:
    """Uncompressed bytes, or rows; with ``skip`` those before the damage.

    Raises:
        ValueError: It is damaged.
    """
    size = 0
    try:
        if source.kind == "parquet":
            return int(open_parquet(source.path).metadata.num_rows)
        if source.kind == "dataset":
            return len(open_dataset(source.path))
        if source.path.suffix.lower() not in (".gz", ".zst"):
            return source.bytes
        with open_lines(source.path) as (file, _):
            for block in iter(lambda: file.read(PIECE_BYTES), b""):
                size += len(block)
    except DamagedError:
        if not skip:
            raise
    return size
