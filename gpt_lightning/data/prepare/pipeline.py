"""Any amount of text to a token store, in bounded memory, by threads: tiktoken lets go of the GIL.

The pieces that are tokenised side by side are written in their order, so what is written is a function of
the sources and the settings alone. It is also one of any number of interruptions: see ``store.py``.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt_lightning.data.prepare.chunk import ReadPosition, TextChunk
from gpt_lightning.data.prepare.encode import EncodedChunk, encode_chunk
from gpt_lightning.data.prepare.inputs import InputFile, find_sources, with_checksums
from gpt_lightning.data.prepare.readers import read_chunks
from gpt_lightning.data.prepare.resume import check_same, check_unfinished
from gpt_lightning.data.prepare.splits import SplitBy, check_texts, nothing_in, with_cuts
from gpt_lightning.data.token_store import (
    PROGRESS,
    StoreWriter,
    check_shards,
    read_manifest,
    read_progress,
    was_written_here,
)
from gpt_lightning.data.tokenizer import token_ranks
from gpt_lightning.storage.atomic import temporary_path
from gpt_lightning.storage.checksum import MANIFEST

OnProgress = Callable[[int, int, int], None]  # bytes read, of how many, tokens

_LOCK = ".lock"
_HIDDEN = {
    _LOCK,
    temporary_path(Path(PROGRESS)).name,
    temporary_path(Path(MANIFEST)).name,
}  # left by a crash
_PROBLEMS_KEPT = 10
_READER = 2  # changes where the same bytes are read as other documents, so that two versions are not mixed
_UNDER_WAY = 8  # pieces a worker, so that none is idle while a shard is synced


@dataclass(frozen=True)
class PrepareConfig:
    """What a store depends on besides its sources.

    Attributes:
        field: Of JSON objects and tables: the one with the text.
        split: 'hash': a document is for validation if the hash of its content is below ``val_ratio``, so
            that other documents have no say. 'ratio': the last ``val_ratio`` of the text is; a plain
            text is cut there, at white space, a row is not.
        shard_tokens: Tokens in a shard; the last of a split has fewer.
    """

    field: str = "text"
    split: SplitBy = "hash"
    val_ratio: float = 0.1
    shard_tokens: int = 100_000_000

    def __post_init__(self) -> None:
        if not 0.0 <= self.val_ratio < 1.0:
            raise ValueError(
                f"val_ratio: {self.val_ratio} leaves nothing for training; give a share from 0 to below 1"
            )
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens: {self.shard_tokens} is too small; give 1 or more")


@dataclass(frozen=True)
class PrepareResult:
    """A whole store.

    Attributes:
        manifest: What it says of itself, see ``store.py``.
        was_there: Whether it was whole already.
        problems: The first of the documents that were skipped now, a line each.
    """

    folder: Path
    manifest: dict[str, Any]
    was_there: bool
    problems: Sequence[str] = ()


def prepare(
    inputs: Sequence[str],
    out: Path,
    settings: PrepareConfig,
    *,
    workers: int = 1,
    skip: bool = False,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> PrepareResult:
    """Tokenise the inputs into a store at ``out``; an unfinished one of the same is gone on with.

    What was not read for that yet may have been corrected since, or be more or less: see ``check_unfinished``.

    Args:
        workers: Threads that tokenise.
        skip: Whether a document that cannot be read, or what is left of a damaged file, is counted (as
            one) and left out instead of raised.
        on_progress: Is told how far it is, once a piece.

    Raises:
        ValueError, OSError: An input cannot be read, ``out`` holds something else, there is nothing to
            validate on, the disk is full. What was done up to the last whole shard stays, and the same
            call goes on from there; without a whole shard nothing stays.
    """
    if workers < 1:
        raise ValueError(f"workers: {workers} is too few; give 1 or more")
    sources = find_sources(inputs)
    _check_out(out)
    sources = with_checksums(sources, workers)
    check_texts(sources, settings.split, settings.val_ratio)
    about = {
        "reader": _READER,
        "settings": asdict(settings),
        "sources": [
            {"path": str(s.path), "kind": s.kind, "bytes": s.bytes, "sha256": s.sha256}
            for s in sources
        ],
    }
    with _locked(out):
        if (out / MANIFEST).exists():
            manifest = read_manifest(out)
            check_same(out, manifest, about)
            check_shards(out, manifest)
            (out / PROGRESS).unlink(missing_ok=True)
            return PrepareResult(out, manifest, was_there=True)
        writer = StoreWriter(out, settings.shard_tokens, about)
        work = _PreparePipeline(
            with_cuts(sources, settings.split, settings.val_ratio, skip=skip),
            settings,
            writer,
            workers,
            skip,
            on_progress,
        )
        if (out / PROGRESS).exists():
            check_unfinished(out, read_progress(out), about)
            work.continue_from(writer.resume())
        try:
            return work.run()
        except (ValueError, OSError):
            if not writer.shards:
                writer.remove()
            raise
        finally:
            writer.close()


class _PreparePipeline:
    """The pieces of the sources from a position on, tokenised by threads and written in order."""

    def __init__(
        self,
        sources: list[InputFile],
        settings: PrepareConfig,
        writer: StoreWriter,
        workers: int,
        skip: bool,
        on_progress: OnProgress,
    ) -> None:
        self.sources, self.settings, self.writer = sources, settings, writer
        self.workers, self.skip, self.on_progress = workers, skip, on_progress
        self._bytes = sum(source.bytes for source in sources)
        self.position = ReadPosition()
        self.skipped = self.empty = 0
        self.problems: list[str] = []

    def continue_from(self, recorded: dict[str, Any]) -> None:
        self.position = ReadPosition(*recorded["at"])
        self.skipped, self.empty = recorded["skipped"], recorded["empty"]

    def run(self) -> PrepareResult:
        token_ranks()  # read once, and not by all threads at once
        before = [(s.path, s.path.stat().st_mtime_ns) for s in self.sources]
        with self._writing():
            self._record()
        with closing(self._encoded()) as pieces:
            for piece, encoded in pieces:
                self._write(piece, encoded)
        if changed := [path for path, time in before if path.stat().st_mtime_ns != time]:
            raise ValueError(
                f"{changed[0]}: was changed while it was read; remove the store, run again"
            )
        self._check_splits()
        with self._writing():
            manifest = self.writer.finish(skipped=self.skipped, empty=self.empty)
        return PrepareResult(self.writer.folder, manifest, was_there=False, problems=self.problems)

    def _encoded(self) -> Generator[tuple[TextChunk, EncodedChunk]]:
        """A few pieces are under way at any time. A reader's mistake comes after what it has read."""
        val_ratio = self.settings.val_ratio
        pieces = read_chunks(
            self.sources, self.position, field=self.settings.field, val_ratio=val_ratio
        )
        encode = partial(
            encode_chunk, name=self.settings.field, val_ratio=val_ratio, skip=self.skip
        )
        under_way: deque[tuple[TextChunk, Future[EncodedChunk]]] = deque()
        mistake: Exception | None = None
        pool = ThreadPoolExecutor(self.workers)
        try:
            while mistake is None:
                try:
                    piece = next(pieces, None)
                except (ValueError, OSError) as error:
                    mistake = error
                    break
                if piece is None:
                    break
                under_way.append((piece, pool.submit(encode, piece)))
                if len(under_way) > _UNDER_WAY * self.workers:
                    piece, future = under_way.popleft()
                    yield piece, future.result()
            while under_way:
                piece, future = under_way.popleft()
                yield piece, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
        if mistake is not None:
            raise mistake

    def _write(self, piece: TextChunk, encoded: EncodedChunk) -> None:
        self.position = piece.after
        with self._writing():
            for split, ids, documents, begins in encoded.tokens:
                self.writer.append(split, ids, documents, begins=begins)
            self.skipped += len(encoded.problems)
            self.empty += encoded.empty
            self.problems += encoded.problems[: _PROBLEMS_KEPT - len(self.problems)]
            if self.writer.has_whole_shards_to_record:
                self._record()
        tokens = sum(split.tokens for split in self.writer.splits.values())
        self.on_progress(piece.done, self._bytes, tokens)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.writer.folder}: cannot be written ({error.strerror or error}); make room, and "
                "the same command goes on from the last whole shard"
            ) from error

    def _record(self) -> None:
        self.writer.record(
            {"at": list(self.position), "skipped": self.skipped, "empty": self.empty}
        )

    def _check_splits(self) -> None:
        splits = self.writer.splits
        documents = sum(split.documents for split in splits.values())
        if not documents:
            left_out = f"; {self.skipped} were skipped" if self.skipped else ""
            raise ValueError(
                f"{self.sources[0].path}: holds no document with text{left_out}; give more"
            )
        for name, split in splits.items():
            if not split.tokens and (name == "train" or self.settings.val_ratio > 0):
                self.writer.close()
                self.writer.remove()
                raise ValueError(nothing_in(name, documents, self.settings.split))


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is no folder; give another --out")
    there = {path.name for path in out.iterdir()} - _HIDDEN if out.exists() else set()
    if there and not was_written_here(out):
        raise ValueError(f"{out}: holds something else ({min(there)}); give a new folder as --out")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The folder, made if need be, for this process alone; one that is left empty is removed."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{out}: another prepare is writing it; wait for that") from error
    try:
        yield
    finally:
        (out / _LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            for path in made:
                path.rmdir()
