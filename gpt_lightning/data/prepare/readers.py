"""Inputs to chunks, in order."""

from collections.abc import Iterator, Sequence

from gpt_lightning.data.prepare.chunk import CHUNK_BYTES, ReadPosition, TextChunk
from gpt_lightning.data.prepare.inputs import (
    CorruptFileError,
    InputFile,
    open_dataset,
    open_lines,
    open_parquet,
)
from gpt_lightning.data.prepare.plain_text import read_documents, read_text
from gpt_lightning.data.prepare.rows import read_dataset, read_lines, read_parquet


def read_chunks(
    sources: Sequence[InputFile],
    start: ReadPosition,
    *,
    field: str,
    val_ratio: float,
    complete_documents: bool = False,
) -> Iterator[TextChunk]:
    """All chunks from ``start`` on. The rest of a damaged input is one chunk, with a problem.

    Args:
        complete_documents: Whether no document of a plain text is cut.

    Raises:
        ValueError, OSError: An input cannot be read, or has no ``field``.
    """
    before = sum(source.bytes for source in sources[: start.source])
    for number, source in enumerate(sources[start.source :], start.source):
        begin = start if number == start.source else ReadPosition(number)
        if source.kind == "text" and complete_documents:
            chunks = read_documents(source, begin, before)
        elif source.kind == "text":
            chunks = read_text(source, begin, before, val_ratio)
        elif source.kind == "lines":
            chunks = read_lines(source, begin, before)
        elif source.kind == "parquet":
            chunks = read_parquet(source, begin, before, field)
        else:
            chunks = read_dataset(source, begin, before, field)
        try:
            yield from chunks
        except CorruptFileError as error:
            problem = str(error).removeprefix(f"{source.path}: ")
            after, done = ReadPosition(number + 1), before + source.bytes
            yield TextChunk(source, b"", ReadPosition(number), after, done, problem=problem)
        except OSError as error:
            raise OSError(
                f"{source.path}: cannot be read: {error.strerror or error}; check it"
            ) from error
        before += source.bytes


def measure(source: InputFile, *, skip: bool) -> int:
    """Uncompressed bytes, or rows, of an input; with ``skip`` those before the damage.

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
            for block in iter(lambda: file.read(CHUNK_BYTES), b""):
                size += len(block)
    except CorruptFileError:
        if not skip:
            raise
    return size
