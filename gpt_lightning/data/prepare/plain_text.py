"""Plain texts to pieces. Their documents are what lies between their ``<|endoftext|>``.

A long one is cut where the tokens of the parts are those of the whole: before white space that follows none.
GPT-2's pattern lets no token reach over such a place, and nothing before it depends on what comes after.
"""

import codecs
import io
import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import IO, cast

from gpt_lightning.data.prepare import chunk
from gpt_lightning.data.prepare.chunk import (
    EOT_BYTES,
    MAX_TEXT_BYTES,
    ReadPosition,
    Split,
    TextChunk,
    split_of,
)
from gpt_lightning.data.prepare.inputs import InputFile
from gpt_lightning.data.unicode import BOM, decoding_problem

_LOOK = 1024  # bytes of a document that say whether it holds anything

_BEFORE_SPACE = re.compile(rb"(?:[!-~]|[\xc2-\xf4][\x80-\xbf]{1,3})(?=[ \n\r])")


def read_text(
    source: InputFile, begin: ReadPosition, before: int, val_ratio: float
) -> Iterator[TextChunk]:
    number, offset, _, split = begin
    size = chunk.CHUNK_BYTES
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
            at = ReadPosition(number, offset, 0, split)
            last = offset + len(data) == end
            begins = split is None
            if begins and (last or EOT_BYTES in data):
                whole = len(data) if last else data.rindex(EOT_BYTES) + len(EOT_BYTES)
                offset, size = offset + whole, chunk.CHUNK_BYTES
                after = ReadPosition(number, offset)
                yield TextChunk(source, data[:whole], at, after, before + offset, fixed)
                continue
            if begins:
                digest, document_end, problem = _scan(file, offset, end)
                split = fixed or split_of(digest, val_ratio)
                if problem:
                    offset, split = document_end, None
                    after = ReadPosition(number, offset)
                    yield TextChunk(source, b"", at, after, before + offset, problem=problem)
                    continue
            if (found := data.find(EOT_BYTES)) >= 0:
                cut, following = found, found + len(EOT_BYTES)
            elif last:
                cut = following = len(data)
            elif cut := safe_cut(data):
                following = cut
            elif size < MAX_TEXT_BYTES:  # a long word
                size, split = 2 * size, at.split
                continue
            else:
                raise ValueError(
                    f"{source.path}: has no white space in {MAX_TEXT_BYTES >> 20} MB from byte {offset}; "
                    "leave it out if it is no text"
                )
            size = chunk.CHUNK_BYTES
            own, offset = split, offset + following
            if found >= 0 or last:
                split = None
            after = ReadPosition(number, offset, 0, split)
            yield TextChunk(
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
    """A long document's hash, where the next one begins, and why it is not UTF-8.

    The hash is :func:`content_hash` of the text as it is tokenised: without a byte order mark, with one kind of
    line end.
    """
    digest, problem = blake2b(digest_size=8), None
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    kept, done, following = b"", 0, end
    at_start = offset == 0

    def take(block: bytes, final: bool) -> None:
        nonlocal done, problem, at_start
        begin = (
            offset + done - len(decoder.getstate()[0])
        )  # of what the decoder has not returned yet
        done += len(block)
        if problem is not None:
            return
        try:
            text = decoder.decode(block, final)
        except UnicodeDecodeError as error:
            problem = f"{decoding_problem(error, begin + error.start)}; convert it to UTF-8"
            return
        if at_start and text:
            text, at_start = text.removeprefix(BOM), False
        digest.update(text.encode())

    file.seek(offset)
    place = offset
    while block := file.read(min(chunk.CHUNK_BYTES, end - place)):
        place += len(block)
        block = kept + block
        if (found := block.find(EOT_BYTES)) >= 0:
            following = offset + done + found + len(EOT_BYTES)
            kept = block[:found]
            break
        keep = len(EOT_BYTES) - 1
        take(block[:-keep], final=False)
        kept = block[-keep:]
    take(kept, final=True)
    return digest.digest(), following, problem


def document_hashes(sources: Sequence[InputFile]) -> Iterator[tuple[Path, bytes | None]]:
    """Of the documents of plain texts that are no mere white space; none of one that is no UTF-8."""
    for source in sources:
        offset = 0
        with source.path.open("rb") as file:
            while offset < source.bytes:
                digest, following, problem = _scan(file, offset, source.bytes)
                file.seek(offset)
                begin = file.read(min(_LOOK, following - offset)).split(EOT_BYTES)[0]
                begin = begin.removeprefix(codecs.BOM_UTF8) if offset == 0 else begin
                if begin.strip() or following - offset > _LOOK:
                    yield source.path, None if problem else digest
                offset = following


def text_cut(path: Path, at_least: int, size: int) -> int:
    """The first place from ``at_least`` where a plain text may be cut: before white space, or after a mark."""
    with path.open("rb") as file:
        start = max(0, at_least - len(EOT_BYTES))
        file.seek(start)
        data = b""
        while True:
            block = file.read(chunk.CHUNK_BYTES)
            data += block
            marks = (m.end() for m in re.finditer(re.escape(EOT_BYTES), data))
            spaces = (
                m.end()
                for m in _BEFORE_SPACE.finditer(data)
                if not m[0].decode(errors="replace").isspace()
            )
            places = [next((p for p in found if start + p >= at_least), None)
                      for found in (marks, spaces)]  # fmt: skip
            if known := [start + place for place in places if place is not None]:
                return min(known)
            if not block or len(data) > MAX_TEXT_BYTES:
                return size
