"""Pipeline of ``prepare``: reads, tokenizes in threads and writes a token store, in bounded memory.

Chunks are tokenized in parallel and written in order, so the store is a function of the inputs and the
settings alone, however often it was interrupted: see ``token_store.py``.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import Timeout

from gpt_lightning.data.prepare.chunk import ReadPosition, TextChunk
from gpt_lightning.data.prepare.clean import Cleaning
from gpt_lightning.data.prepare.encode import (
    DECODED_BY_FALLBACK,
    STRIPPED,
    TOO_LITTLE_ASCII,
    EncodedChunk,
    encode_chunk,
)
from gpt_lightning.data.prepare.fast_tokenizer import (
    CHECKED_TOKENS,
    MAX_WORKERS,
    load_in_background,
)
from gpt_lightning.data.prepare.inputs import InputFile, find_inputs, with_checksums
from gpt_lightning.data.prepare.readers import read_chunks
from gpt_lightning.data.prepare.resume import check_same, check_unfinished
from gpt_lightning.data.prepare.splits import SplitBy, check_texts, empty_split_message, with_cuts
from gpt_lightning.data.token_store import (
    PROGRESS,
    StoreWriter,
    check_shards,
    read_manifest,
    read_progress,
    was_written_here,
)
from gpt_lightning.data.tokenizer import GPT2, Tokenizer
from gpt_lightning.data.unicode import printable
from gpt_lightning.storage.atomic import created_folder, temporary_path
from gpt_lightning.storage.checksum import MANIFEST
from gpt_lightning.storage.lock import lock_file

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int, int], None]  # bytes read, of how many, tokens

_LOCK = ".lock"
_LEFTOVERS = {
    _LOCK,
    temporary_path(Path(PROGRESS)).name,
    temporary_path(Path(MANIFEST)).name,
}  # of a crash
_MAX_PROBLEMS = 10
_READER = (
    2  # grows when the same bytes are read as other documents, so that two versions are not mixed
)
_CHUNKS_PER_WORKER = 8  # in progress, so that no worker is idle while a shard is synced


@dataclass(frozen=True)
class PrepareConfig:
    """What a store depends on besides its inputs.

    Attributes:
        field: Field of JSON objects and tables that has the text.
        split: 'hash': a document is for validation if the hash of its content is below ``val_ratio``, whatever
            the other documents are. 'ratio': the last ``val_ratio`` of the text is for validation; a plain text
            is cut there, at white space, a row is not.
        shard_tokens: Tokens in a shard; the last of a split has fewer.
        fallback_encoding, strip_gutenberg, min_ascii, collapse_blank_lines: See :class:`Cleaning`.
    """

    field: str = "text"
    split: SplitBy = "hash"
    val_ratio: float = 0.1
    shard_tokens: int = 100_000_000
    fallback_encoding: str | None = None
    strip_gutenberg: bool = False
    min_ascii: float = 0.0
    collapse_blank_lines: bool = False

    @property
    def cleaning(self) -> Cleaning:
        return Cleaning(
            self.fallback_encoding, self.strip_gutenberg, self.min_ascii, self.collapse_blank_lines
        )

    def __post_init__(self) -> None:
        _ = self.cleaning  # it checks its values
        if not 0.0 <= self.val_ratio < 1.0:
            raise ValueError(
                f"val_ratio: {self.val_ratio} leaves nothing for training; give a share from 0 to below 1"
            )
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens: {self.shard_tokens} is too small; give 1 or more")


@dataclass(frozen=True)
class PrepareResult:
    """A complete store.

    Attributes:
        manifest: Its manifest, see ``token_store.py``.
        already_prepared: Whether it was complete before this call.
        problems: The first documents that this call skipped, one line each.
    """

    folder: Path
    manifest: dict[str, Any]
    already_prepared: bool
    problems: Sequence[str] = ()


def prepare(
    inputs: Sequence[str],
    out: Path,
    settings: PrepareConfig,
    *,
    tokenizer: Tokenizer = GPT2,
    workers: int = 1,
    skip: bool = False,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> PrepareResult:
    """Tokenize the inputs into a store at ``out``; an unfinished store of the same inputs is resumed.

    Args:
        workers: Threads that tokenize.
        skip: Whether a document that cannot be read, or the rest of a damaged file, is left out and counted
            (as one) instead of raised.
        on_progress: Called after each chunk.

    Raises:
        ValueError, OSError: An input cannot be read, ``out`` holds something else, there is nothing to
            validate on, the disk is full. The shards that are complete stay, and the same call resumes after
            them; without a complete shard nothing stays.
    """
    if workers < 1:
        raise ValueError(f"workers: {workers} is too few; give 1 or more")
    sources = find_inputs(inputs)
    _check_out(out)
    sources = with_checksums(sources, workers)
    if not settings.cleaning.is_on:  # else the split of a document depends on its cleaned text
        check_texts(sources, settings.split, settings.val_ratio)
    about = {
        "reader": _READER,
        "settings": asdict(settings),
        "sources": [
            {"path": s.path.as_posix(), "kind": s.kind, "bytes": s.bytes, "sha256": s.sha256}
            for s in sources
        ],
    }
    writer = StoreWriter(out, settings.shard_tokens, about, tokenizer)
    with _locked(out):
        if (out / MANIFEST).exists():
            manifest = read_manifest(out)
            check_same(out, _with_all_settings(manifest), writer.about)
            check_shards(out, manifest, tokenizer)
            (out / PROGRESS).unlink(missing_ok=True)
            return PrepareResult(out, manifest, already_prepared=True)
        work = _PreparePipeline(
            with_cuts(sources, settings.split, settings.val_ratio, skip=skip),
            settings,
            writer,
            workers,
            skip,
            on_progress,
        )
        if (out / PROGRESS).exists():
            check_unfinished(out, _with_all_settings(read_progress(out)), writer.about)
            work.continue_from(writer.resume())
        try:
            return work.run()
        except (ValueError, OSError):
            if not writer.shards:
                writer.remove()
            raise
        finally:
            writer.close()


def _with_all_settings(recorded: dict[str, Any]) -> dict[str, Any]:
    """What a store records, also of a version that did not have all settings."""
    return {**recorded, "settings": {**asdict(PrepareConfig()), **recorded["settings"]}}


class _PreparePipeline:
    """Chunks of the inputs from a position on, tokenized by threads and written in order."""

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
        self.cleaned: Counter[str] = Counter()
        self.problems: list[str] = []
        self._recorded_problems = 0
        self._fast = load_in_background(writer.tokenizer) if _may_be_large(sources) else None
        self._with_tiktoken = False  # until the shard is complete

    def continue_from(self, recorded: dict[str, Any]) -> None:
        self.position = ReadPosition(*recorded["at"])
        self.skipped, self.empty = recorded["skipped"], recorded["empty"]
        self.cleaned = Counter(recorded.get("cleaned", {}))

    def run(self) -> PrepareResult:
        self.writer.tokenizer.load()
        before = [(s.path, s.path.stat().st_mtime_ns) for s in self.sources]
        with self._writing():
            self._record()
        while not self._write_chunks():
            pass
        if changed := [path for path, time in before if path.stat().st_mtime_ns != time]:
            raise ValueError(
                f"{changed[0]}: was changed while it was read; remove the store and run again"
            )
        self._check_splits()
        with self._writing():
            manifest = self.writer.finish(**self._counts())
        return PrepareResult(
            self.writer.folder, manifest, already_prepared=False, problems=self.problems
        )

    @property
    def _tokens(self) -> int:
        return sum(split.tokens for split in self.writer.splits.values())

    def _write_chunks(self) -> bool:
        """Write all chunks from the position on, and return True; or stop where another tokenizer has to go on."""
        with closing(self._encoded()) as chunks:
            for chunk, encoded in chunks:
                difference = encoded.difference
                if self._tokens < CHECKED_TOKENS:
                    difference = difference or encoded.unsampled_difference
                if difference is not None:
                    self._go_back(chunk, difference)
                    return False
                recorded = self._write(chunk, encoded)
                if recorded and self._with_tiktoken:
                    self._with_tiktoken = False
                    return False
        return True

    def _go_back(self, chunk: TextChunk, difference: str) -> None:
        """Go back to where a shard was last completed, from where on tiktoken tokenizes until the next one is."""
        assert self._fast is not None
        fast = self._fast.result()
        assert fast is not None
        logger.warning(
            printable(
                f"{fast.name}: {difference} ({chunk.source.path}, from {_place(chunk)} on); tiktoken tokenizes "
                "this shard again"
            )
        )
        self.writer.close()
        self.continue_from(self.writer.resume())
        del self.problems[self._recorded_problems :]
        self._with_tiktoken = True

    def _encoded(self) -> Generator[tuple[TextChunk, EncodedChunk]]:
        """Chunks with their tokens, in order; a few are in progress. A reader's error is raised after its chunks."""
        val_ratio = self.settings.val_ratio
        chunks = read_chunks(
            self.sources,
            self.position,
            field=self.settings.field,
            val_ratio=val_ratio,
            complete_documents=self.settings.cleaning.is_on,
        )
        fast = None if self._with_tiktoken else self._fast
        workers = self.workers if fast is None else min(self.workers, MAX_WORKERS)
        encode = partial(
            encode_chunk,
            name=self.settings.field,
            val_ratio=val_ratio,
            skip=self.skip,
            tokenizer=self.writer.tokenizer,
            cleaning=self.settings.cleaning,
            fast=fast,
        )
        in_progress: deque[tuple[TextChunk, Future[EncodedChunk]]] = deque()
        failure: Exception | None = None
        pool = ThreadPoolExecutor(workers)
        try:
            while failure is None:
                try:
                    chunk = next(chunks, None)
                except (ValueError, OSError) as error:
                    failure = error
                    break
                if chunk is None:
                    break
                compare_all = self._tokens < CHECKED_TOKENS  # some more than in _write_chunks
                in_progress.append((chunk, pool.submit(encode, chunk, compare_all=compare_all)))
                if len(in_progress) >= (1 if compare_all else _CHUNKS_PER_WORKER) * workers:
                    chunk, future = in_progress.popleft()
                    yield chunk, future.result()
            while in_progress:
                chunk, future = in_progress.popleft()
                yield chunk, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
        if failure is not None:
            raise failure

    def _write(self, chunk: TextChunk, encoded: EncodedChunk) -> bool:
        """Write a chunk's tokens; returns whether a shard was completed."""
        self.position = chunk.after
        with self._writing():
            for split, ids, documents, begins in encoded.tokens:
                self.writer.append(split, ids, documents, begins=begins)
            self.skipped += len(encoded.problems)
            self.empty += encoded.empty
            self.cleaned += encoded.cleaned
            self.problems += encoded.problems[: _MAX_PROBLEMS - len(self.problems)]
            if is_complete := self.writer.has_shards_to_record:
                self._record()
        self.on_progress(chunk.done, self._bytes, self._tokens)
        return is_complete

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.writer.folder}: cannot be written ({error.strerror or error}); make room, and "
                "run the same command again: it resumes after the last complete shard"
            ) from error

    def _record(self) -> None:
        self.writer.record({"at": list(self.position), **self._counts()})
        self._recorded_problems = len(self.problems)

    def _counts(self) -> dict[str, Any]:
        counts: dict[str, Any] = {"skipped": self.skipped, "empty": self.empty}
        if self.settings.cleaning.is_on:
            counts["cleaned"] = {
                way: self.cleaned[way] for way in (STRIPPED, DECODED_BY_FALLBACK, TOO_LITTLE_ASCII)
            }
        return counts

    def _check_splits(self) -> None:
        splits = self.writer.splits
        documents = sum(split.documents for split in splits.values())
        if not documents:
            left_out = f"; {self.skipped} were skipped" if self.skipped else ""
            if few := self.cleaned[TOO_LITTLE_ASCII]:
                left_out += f"; {few} have a smaller share of ASCII than --min_ascii"
            raise ValueError(
                f"{self.sources[0].path}: holds no document with text{left_out}; give more"
            )
        for name, split in splits.items():
            if not split.tokens and (name == "train" or self.settings.val_ratio > 0):
                self.writer.close()
                self.writer.remove()
                raise ValueError(empty_split_message(name, documents, self.settings.split))


def _may_be_large(sources: Sequence[InputFile]) -> bool:
    """Whether a fast tokenizer may help: tiktoken encodes all of a small store, and a byte has one token at most."""
    suffixes = {source.path.suffix.lower() for source in sources}
    is_compressed = bool(suffixes & {".gz", ".zst", ".parquet"})
    return is_compressed or sum(source.bytes for source in sources) >= CHECKED_TOKENS


def _place(chunk: TextChunk) -> str:
    if chunk.source.kind == "text":
        return f"byte {chunk.at.offset}"
    if chunk.source.kind == "lines":
        return f"line {chunk.at.line + 1}"
    return f"row {chunk.at.offset + 1}"


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is not a folder; give another --out")
    names = {path.name for path in out.iterdir()} - _LEFTOVERS if out.exists() else set()
    if names and not was_written_here(out):
        raise ValueError(f"{out}: holds something else ({min(names)}); give a new folder as --out")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock the folder, and create it if it is missing; a new folder that stays empty is removed."""
    with created_folder(out):
        try:
            with lock_file(out / _LOCK):
                yield
        except Timeout as error:
            raise ValueError(f"{out}: another prepare is writing it; wait for that") from error
