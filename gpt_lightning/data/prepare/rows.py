"""Reads JSONL, parquet and folders of ``datasets`` as chunks; a row is a document."""

from collections.abc import Iterator, Sequence
from typing import IO, Any

from gpt_lightning.data.prepare import chunk
from gpt_lightning.data.prepare.chunk import MAX_TEXT_BYTES, ReadPosition, TextChunk
from gpt_lightning.data.prepare.inputs import (
    InputFile,
    checked,
    open_dataset,
    open_lines,
    open_parquet,
)

_ROWS = 256  # of a table, read together


def read_lines(source: InputFile, begin: ReadPosition, before: int) -> Iterator[TextChunk]:
    number, offset, line, _ = begin
    with open_lines(source.path) as (file, raw):
        if file is raw:
            raw.seek(offset)
        else:
            _skip(file, offset)
        rest = b""
        while True:
            block = file.read(chunk.CHUNK_BYTES)
            data = rest + block
            complete = data.rfind(b"\n") + 1 if block else len(data)
            if not complete:
                if not block:
                    return
                if len(data) > MAX_TEXT_BYTES:
                    raise ValueError(
                        f"{source.path}, line {line + 1}: is longer than {MAX_TEXT_BYTES >> 20} MB; "
                        "give one JSON object a line"
                    )
                rest = data
                continue
            content, rest = data[:complete], data[complete:]
            at = ReadPosition(number, offset, line)
            offset, line = offset + complete, line + content.count(b"\n")
            after = ReadPosition(number, offset, line)
            yield TextChunk(source, content, at, after, before + raw.tell())


def _skip(file: IO[bytes], size: int) -> None:
    while size:
        read = len(file.read(min(size, chunk.CHUNK_BYTES)))
        if not read:
            raise OSError("it became shorter while it was read")
        size -= read


def read_parquet(
    source: InputFile, begin: ReadPosition, before: int, field: str
) -> Iterator[TextChunk]:
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
            f"{source.path}: has no text {field}, but {kind}; name the field of the text with --field"
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
            yield from _row_chunks(source, begin, before, file.metadata.num_rows, first, columns)
        first += rows


def read_dataset(
    source: InputFile, begin: ReadPosition, before: int, field: str
) -> Iterator[TextChunk]:
    dataset = open_dataset(source.path)
    if field not in dataset.column_names:
        raise ValueError(_no_field(source, field, dataset.column_names))
    first = begin.offset - begin.offset % _ROWS
    columns = (list(dataset[row : row + _ROWS][field]) for row in range(first, len(dataset), _ROWS))
    yield from _row_chunks(
        source, begin, before, len(dataset), first, checked(columns, source.path)
    )


def _row_chunks(
    source: InputFile,
    begin: ReadPosition,
    before: int,
    total: int,
    row: int,
    columns: Iterator[Any],
) -> Iterator[TextChunk]:
    """Chunks of the columns' rows from ``begin`` on; the first row of the columns is ``row``."""
    for column in columns:
        skipped = max(0, min(len(column), begin.offset - row))
        column, row = column[skipped:], row + skipped
        size = (
            column.nbytes if hasattr(column, "nbytes") else sum(len(text or "") for text in column)
        )
        step = max(1, len(column) * chunk.CHUNK_BYTES // max(size, 1))
        for i in range(0, len(column), step):
            rows = column[i : i + step]
            at, after = ReadPosition(begin.source, row), ReadPosition(begin.source, row + len(rows))
            row += len(rows)
            yield TextChunk(source, rows, at, after, before + source.bytes * row // total)


def as_python(rows: Any) -> list[Any]:
    """Rows of a chunk: texts, ``None``, or other values of a table; a text that is not UTF-8 is ``bytes``."""
    if isinstance(rows, list):
        return rows
    try:
        return list(rows.to_pylist())
    except UnicodeDecodeError:
        return [_text_or_bytes(row) for row in rows]


def _text_or_bytes(row: Any) -> Any:
    try:
        return row.as_py()
    except UnicodeDecodeError:
        return row.as_buffer().to_pybytes()


def _no_field(source: InputFile, field: str, names: Sequence[str]) -> str:
    return f"{source.path}: has no text {field} (but {', '.join(names)}); name the field of the text with --field"
