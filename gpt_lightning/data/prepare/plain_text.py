"""Plain texts to chunks. ``<|endoftext|>`` separates their documents.

A long document is cut where the parts have the same tokens as the complete document: before white space that does
not follow white space. By GPT-2's pattern no token spans such a cut, and no token before it depends on the text
after it.
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

_PEEK_BYTES = 1024  # of a document, to see whether it is only white space

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
                complete = len(data) if last else data.rindex(EOT_BYTES) + len(EOT_BYTES)
                offset, size = offset + complete, chunk.CHUNK_BYTES
                after = ReadPosition(number, offset)
                yield TextChunk(source, data[:complete], at, after, before + offset, fixed)
                continue
            if begins:
                digest, document_end, problem = _scan(file, offset, end)
                split = fixed or split_of(digest, val_ratio)
                if problem:
                    offset, split = document_end, None
                    after = ReadPosition(number, offset)
                    yield TextChunk(source, b"", at, after, before + offset, problem=problem)
                    continue
            if (delimiter := data.find(EOT_BYTES)) >= 0:
                cut, following = delimiter, delimiter + len(EOT_BYTES)
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
                    "leave it out if it is not a text"
                )
            size = chunk.CHUNK_BYTES
            chunk_split, offset = split, offset + following
            if delimiter >= 0 or last:
                split = None
            after = ReadPosition(number, offset, 0, split)
            yield TextChunk(
                source,
                data[:cut],
                at,
                after,
                before + offset,
                chunk_split,
                part=True,
                begins=begins,
            )


def read_documents(source: InputFile, begin: ReadPosition, before: int) -> Iterator[TextChunk]:
    """Complete documents, which cleaning needs."""
    number, offset, *_ = begin
    size = chunk.CHUNK_BYTES
    with source.path.open("rb") as file:
        while offset < source.bytes:
            file.seek(offset)
            data = file.read(size)
            if not data:
                raise OSError("it became shorter while it was read")
            if offset + len(data) == source.bytes:
                complete = len(data)
            else:
                complete = data.rfind(EOT_BYTES) + len(EOT_BYTES) if EOT_BYTES in data else 0
            if not complete:
                if size >= MAX_TEXT_BYTES:
                    raise ValueError(
                        f"{source.path}: has a document of more than {MAX_TEXT_BYTES >> 20} MB from byte {offset}, "
                        "which cannot be cleaned; split it, or leave out the options that clean texts"
                    )
                size *= 2
                continue
            at, size = ReadPosition(number, offset), chunk.CHUNK_BYTES
            offset += complete
            after = ReadPosition(number, offset)
            yield TextChunk(source, data[:complete], at, after, before + offset)


def safe_cut(text: bytes) -> int:
    """The last position where a text may be cut into two that are tokenized separately; 0: there is none."""
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

    The hash is :func:`content_hash` of the text that is tokenized: without a byte order mark, with one kind of
    line end.
    """
    digest, problem = blake2b(digest_size=8), None
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    carried, done, following = b"", 0, end
    at_start = offset == 0

    def update(block: bytes, final: bool) -> None:
        nonlocal done, problem, at_start
        # offset of the first byte that the decoder has not returned yet
        begin = offset + done - len(decoder.getstate()[0])
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
    position = offset
    while block := file.read(min(chunk.CHUNK_BYTES, end - position)):
        position += len(block)
        block = carried + block
        if (delimiter := block.find(EOT_BYTES)) >= 0:
            following = offset + done + delimiter + len(EOT_BYTES)
            carried = block[:delimiter]
            break
        tail = len(EOT_BYTES) - 1  # bytes that may begin a delimiter
        update(block[:-tail], final=False)
        carried = block[-tail:]
    update(carried, final=True)
    return digest.digest(), following, problem


def document_hashes(sources: Sequence[InputFile]) -> Iterator[tuple[Path, bytes | None]]:
    """File and hash of each document of plain texts that is not only white space; None for one that is not UTF-8."""
    for source in sources:
        offset = 0
        with source.path.open("rb") as file:
            while offset < source.bytes:
                digest, following, problem = _scan(file, offset, source.bytes)
                file.seek(offset)
                begin = file.read(min(_PEEK_BYTES, following - offset)).split(EOT_BYTES)[0]
                begin = begin.removeprefix(codecs.BOM_UTF8) if offset == 0 else begin
                if begin.strip() or following - offset > _PEEK_BYTES:
                    yield source.path, None if problem else digest
                offset = following


def text_cut(path: Path, at_least: int, size: int) -> int:
    """The first offset from ``at_least`` where a plain text may be cut: before white space, or after a delimiter."""
    with path.open("rb") as file:
        start = max(0, at_least - len(EOT_BYTES))
        file.seek(start)
        data = b""
        while True:
            block = file.read(chunk.CHUNK_BYTES)
            data += block
            delimiters = (m.end() for m in re.finditer(re.escape(EOT_BYTES), data))
            spaces = (
                m.end()
                for m in _BEFORE_SPACE.finditer(data)
                if not m[0].decode(errors="replace").isspace()
            )
            cuts = [next((end for end in ends if start + end >= at_least), None)
                    for ends in (delimiters, spaces)]  # fmt: skip
            if possible := [start + cut for cut in cuts if cut is not None]:
                return min(possible)
            if not block or len(data) > MAX_TEXT_BYTES:
                return size
