"""Input files of ``prepare``: files, folders and globs to a list, always in the same order."""

import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, cast

from gpt_lightning.data.corpus import TEXT_SUFFIXES
from gpt_lightning.data.folders import files_in, without_duplicates
from gpt_lightning.storage.checksum import cached_sha256

Kind = Literal["text", "lines", "parquet", "dataset"]
SUFFIXES: dict[str, Kind] = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    ".jsonl": "lines",
    ".jsonl.gz": "lines",
    ".jsonl.zst": "lines",
    ".parquet": "parquet",
}
_DATASET_FILES = ("state.json", "dataset_info.json")  # of datasets' save_to_disk
_DATASETS_FILE = "dataset_dict.json"  # of several
_ZSTD_INPUT = 256  # bytes read at once; 12 of them may hold 128 KB of text


class CorruptFileError(ValueError):
    """A file that cannot be read from some offset on."""


@dataclass(frozen=True)
class InputFile:
    """A file, or a folder of Hugging Face's ``datasets``.

    Attributes:
        sha256: Checksum of the file; for a folder, of its files' checksums.
        train_until: Where the training split ends, as offset (uncompressed bytes) or row. ``None``: the content
            of each document decides.
    """

    path: Path
    kind: Kind
    bytes: int
    sha256: str = ""
    train_until: int | None = None


def find_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """The inputs in their order, a folder's and a glob's files by path, no file twice: see :func:`files_in`.

    Raises:
        ValueError, OSError: An input does not exist, holds nothing to read, or is of an unknown kind.
    """
    by_path: dict[Path, InputFile] = {}
    for name in inputs:
        for source in _expand(name):
            by_path.setdefault(source.path, source)
    if not by_path:
        raise ValueError("input: is missing; name text files, folders or globs")
    return [by_path[path] for path in without_duplicates(by_path)]


def with_checksums(sources: Sequence[InputFile], workers: int) -> list[InputFile]:
    """The inputs with their checksums, computed by ``workers`` threads."""

    def add(source: InputFile) -> InputFile:
        try:
            return replace(source, sha256=_sha256(source))
        except OSError as error:
            raise OSError(f"{source.path}: cannot be read: {error.strerror}; check it") from error

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(add, sources))


def _sha256(source: InputFile) -> str:
    if source.kind != "dataset":
        return cached_sha256(source.path)
    files = (path for path in source.path.iterdir() if not path.name.startswith("."))
    checksums = [cached_sha256(path) for path in sorted(files) if path.is_file()]
    return hashlib.sha256("".join(checksums).encode()).hexdigest()


def _expand(name: str) -> Iterator[InputFile]:
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        yield from _of_folder(path)
    elif path.exists():
        kind = _kind(path)
        if kind is None:
            raise ValueError(f"{path}: is of an unknown kind; give {_KNOWN}, or convert it")
        yield InputFile(path, kind, path.stat().st_size)
    elif glob.has_magic(name):
        matching = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        sources = [source for match in matching for source in _of_match(match)]
        if not sources:
            raise FileNotFoundError(f"{name}: matches nothing to read; give {_KNOWN}")
        yield from sources
    else:
        raise FileNotFoundError(f"{name}: does not exist; give {_KNOWN}, a folder or a glob")


def _of_match(path: Path) -> list[InputFile]:
    """A match of a glob, which may hold nothing to read."""
    if path.is_dir():
        with suppress(FileNotFoundError):
            return list(_of_folder(path))
    elif path.is_file() and (kind := _kind(path)):
        return [InputFile(path, kind, path.stat().st_size)]
    return []


def _of_folder(folder: Path) -> Iterator[InputFile]:
    if (folder / _DATASETS_FILE).exists():
        parts = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise ValueError(
            f"{folder}: holds several datasets ({', '.join(parts)}); name one of them, "
            f"such as {folder / (parts or ['train'])[0]}"
        )
    if all((folder / name).exists() for name in _DATASET_FILES):
        yield InputFile(
            folder, "dataset", sum(path.stat().st_size for path in folder.glob("*.arrow"))
        )
        return
    files = [(path, _kind(path)) for path in files_in(folder, lambda file: _kind(file) is not None)]
    if not files:
        raise FileNotFoundError(
            f"{folder}: holds nothing to read; expected {_KNOWN} files that are not hidden"
        )
    for path, kind in files:
        assert kind is not None
        yield InputFile(path, kind, path.stat().st_size)


def _kind(path: Path) -> Kind | None:
    name = path.name.lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


_KNOWN = f"{', '.join(list(SUFFIXES)[:-1])} or {list(SUFFIXES)[-1]}"


# --- opening ----------------------------------------------------------------------------------------


@contextmanager
def open_lines(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A file of lines, uncompressed while it is read, and the compressed file.

    Raises:
        ValueError: It needs a library that is not installed, or is damaged (raised while it is read).
    """
    with path.open("rb") as raw:
        name = path.name.lower()
        if name.endswith(".gz"):
            with gzip.open(raw) as file:
                blocks = iter(partial(file.read1, 65536), b"")
                text = _Uncompressed(path, blocks, (EOFError, gzip.BadGzipFile, zlib.error))
                yield cast(IO[bytes], text), raw
        elif name.endswith(".zst"):
            zstandard = _library("zstandard", path)
            blocks = _zstd_blocks(raw, zstandard)
            text = _Uncompressed(path, blocks, (EOFError, zstandard.ZstdError))
            yield cast(IO[bytes], text), raw
        else:
            yield raw, raw


class _Uncompressed:
    """Text read from blocks. It is read up to the damaged block, in reads of any size."""

    def __init__(
        self, path: Path, blocks: Iterator[bytes], errors: tuple[type[Exception], ...]
    ) -> None:
        self._path, self._blocks, self._errors = path, blocks, errors
        self._text = bytearray()
        self._damage: Exception | None = None

    def read(self, size: int) -> bytes:
        while self._damage is None and len(self._text) < size:
            try:
                block = next(self._blocks, b"")
            except self._errors as error:
                self._damage = error
                break
            if not block:
                break
            self._text += block
        if self._damage is not None and not self._text:
            raise _damaged(self._path, self._damage) from self._damage
        text = bytes(self._text[:size])
        del self._text[:size]
        return text


def _zstd_blocks(raw: IO[bytes], zstandard: Any) -> Iterator[bytes]:
    """Text of any number of frames. zstandard's own reader takes a frame that is cut off for complete."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    while compressed := raw.read(_ZSTD_INPUT):
        while compressed:
            frame = frame or decompressor.decompressobj()
            if block := frame.decompress(compressed):
                yield block
            compressed = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("it ends within a frame")


def open_parquet(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile``."""
    _library("pyarrow", path)
    from pyarrow import parquet

    with _damage_to_arrow(path):
        # by pages: a row group may be a gigabyte
        return parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def checked(batches: Iterator[Any], path: Path) -> Iterator[Any]:
    """Arrow's batches, with errors that name the file."""
    with _damage_to_arrow(path):
        yield from batches


@contextmanager
def _damage_to_arrow(path: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise  # an error of the machine, not of the file
        raise _damaged(path, error) from error


def open_dataset(folder: Path) -> Any:
    """A ``datasets.Dataset``."""
    datasets = _library("datasets", folder)
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # one of a dozen files may be wrong in any way
        raise CorruptFileError(
            f"{folder}: is damaged ({type(error).__name__}); save it again, or --on_error skip"
        ) from error


def _library(name: str, path: Path) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        wanted = "datasets" if name == "datasets" else "'gpt-lightning[data]'"
        raise ValueError(f"{path}: needs {name} to be read; pip install {wanted}") from error


def _damaged(path: Path, error: Exception) -> CorruptFileError:
    return CorruptFileError(f"{path}: is damaged ({error}); download it again, or --on_error skip")
