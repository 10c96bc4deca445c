"""GPT-2's tokenizer in the package ``fastokens`` (extra ``fast``), which is checked against tiktoken all the time.

The bytes that the ids spell are compared with each document. tiktoken encodes a sample of all text, and all of the
first million tokens of a store. The pipeline encodes a shard again where one id differs.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.data.tokenizer import END_OF_TEXT_ID, GPT2, Ids, Tokenizer
from gpt_lightning.data.tokenizer_json import gpt2_content

logger = logging.getLogger(__name__)

PACKAGE = "fastokens"
MAX_WORKERS = 4  # fastokens keeps up to about 130 MB of encoded words for each thread
CHECKED_TOKENS = 1_000_000  # the first ones of a store, of which tiktoken encodes all
_BATCH_CHARACTERS = 1 << 16  # encoded and checked together, in the processor's cache
# tiktoken encodes the first bytes of each block, 1.2 %. The size is odd, so that blocks do not begin where a tokenizer
# may divide a long text.
_BLOCK_BYTES = 80_009
_SAMPLE_BYTES = 960
# tiktoken refuses about a million blanks in a row; the texts that may have them are left to it
_MANY_BLANKS = 50_000
# Where pieces that are encoded apart have the tokens of the whole: before white space, after another character. A
# byte of 0x80 or more stands here if no white space of Unicode ends with it.
_CUT = re.compile(rb"[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf](?=[ \n])")
_WORD = 8  # bytes that are compared at once


class DifferenceError(Exception):
    """Ids that are not tiktoken's, or do not spell the text."""


@final
class FastTokenizer:
    """Token ids of documents, with checks.

    Args:
        backend: A tokenizer without special tokens, with fastokens' ``encode_batch_flat``.
        name: Package and version, for messages.
    """

    def __init__(self, backend: Any, name: str) -> None:
        self.name = name
        self._backend = backend
        tokens = [*GPT2.token_bytes]
        tokens[END_OF_TEXT_ID] = b""  # no text has it
        self._lengths = np.array([len(token) for token in tokens], dtype=np.uint8)
        # the bytes of each token in words of 8, and which bits of a word are the token's
        width = -(-max(map(len, tokens)) // _WORD) * _WORD
        table = b"".join(token.ljust(width, b"\0") for token in tokens)
        used = b"".join((b"\xff" * len(token)).ljust(width, b"\0") for token in tokens)
        self._words = np.frombuffer(table, dtype="<u8").reshape(len(tokens), -1).T.copy()
        self._masks = np.frombuffer(used, dtype="<u8").reshape(len(tokens), -1).T.copy()

    def encode_documents(self, texts: Sequence[str]) -> Ids:
        """Token ids of documents with one delimiter between them, as :meth:`Tokenizer.encode_documents` gives them.

        Raises:
            DifferenceError: A check failed.
            ValueError: tiktoken refuses a text.
        """
        if not texts or any(map(_may_be_refused, texts)):
            return GPT2.encode_documents(texts)
        parts, offset = [], 0
        for batch in _batches(texts):
            ids, size = self._encode_batch(batch, offset)
            parts.append(ids)
            offset += size
        return np.concatenate(parts)[:-1]

    def _encode_batch(self, texts: list[str], offset: int) -> tuple[Ids, int]:
        """Token ids of documents with a delimiter after each, and the size of the documents in bytes.

        Args:
            offset: Bytes before them, which decide where the samples are.
        """
        contents = [text.encode() for text in texts]
        ids, bounds = self._encode(texts)
        ends = self._ends(ids, b"".join(contents))
        begins = np.cumsum([0, *map(len, contents)])
        if not np.array_equal(ends[bounds], begins):
            raise DifferenceError("a token reaches into the next document")
        for begin, content in zip(begins.tolist(), contents, strict=False):
            for start, end in _sample(content, offset + begin):
                self._check_sample(ids, ends, begin + start, content[start:end])
        ids = np.insert(ids.astype(GPT2.dtype), bounds[1:], END_OF_TEXT_ID)
        return ids, int(begins[-1])

    def _encode(self, texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """All ids, and the index of each text's first one with the number of all at the end."""
        try:
            parts = [self._backend.encode_batch_flat([text])[0] for text in texts]
            ids = np.frombuffer(b"".join(parts), dtype="<u4")
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of Rust is not an Exception
            raise DifferenceError(f"it fails ({type(error).__name__})") from error
        return ids, np.cumsum([0, *map(len, parts)]) // ids.itemsize

    def _ends(self, ids: NDArray[np.uint32], content: bytes) -> NDArray[np.int64]:
        """0, and the offset where each token ends, if the tokens spell ``content``."""
        if ids.size and ids.max() >= END_OF_TEXT_ID:
            raise DifferenceError("an id is not one of text")
        index = ids.astype(np.intp)
        lengths = self._lengths.take(index)
        ends = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(lengths, dtype=np.int64, out=ends[1:])
        if ends[-1] != len(content):
            raise DifferenceError("its ids do not spell the text")
        starts = ends[:-1]
        # the 8 bytes from every offset on
        windows = np.ndarray(len(content) + 1, "<u8", content + bytes(_WORD), strides=(1,))
        for words, masks in zip(self._words, self._masks, strict=True):
            different = windows[starts]
            different ^= words.take(index)
            different &= masks.take(index)
            if different.any():
                raise DifferenceError("its ids do not spell the text")
            longer = np.flatnonzero(lengths > _WORD)
            if not longer.size:
                break
            index, lengths, starts = index[longer], lengths[longer] - _WORD, starts[longer] + _WORD
        return ends

    @staticmethod
    def _check_sample(
        ids: NDArray[np.uint32], ends: NDArray[np.int64], start: int, content: bytes
    ) -> None:
        first, last = np.searchsorted(ends, [start, start + len(content)])
        expected = GPT2.encode_documents([content.decode()])
        if not np.array_equal(ids[first:last], expected):
            raise DifferenceError("its ids are not those of tiktoken")


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _sample(content: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """Where the pieces of a document begin and end of which tiktoken's ids are compared.

    A text that cannot be cut is one piece.

    Args:
        offset: Where the document begins in the text of which blocks are counted.
    """
    pieces = 0
    for block in range(-(offset % _BLOCK_BYTES), len(content), _BLOCK_BYTES):
        start = 0
        if block + _SAMPLE_BYTES <= 0:
            continue
        if block > 0:
            first = _CUT.search(content, block)
            if first is None:
                if not pieces:
                    yield 0, len(content)
                return
            start = first.end()
        last = _CUT.search(content, start + _SAMPLE_BYTES if block > 0 else block + _SAMPLE_BYTES)
        yield start, last.end() if last else len(content)
        pieces += 1


def _may_be_refused(text: str) -> bool:
    starts = range(0, len(text) - _MANY_BLANKS + 1, _MANY_BLANKS)
    return any(text[at : at + _MANY_BLANKS].isspace() for at in starts)


def find_fast_tokenizer(tokenizer: Tokenizer) -> FastTokenizer | None:
    """The fast tokenizer, if it is installed and ``tokenizer`` is GPT-2's; one line of the log says if it is not."""
    return _gpt2() if tokenizer is GPT2 else None


@cache
def _gpt2() -> FastTokenizer | None:
    try:
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")  # prepare has its own threads
        package = import_module(PACKAGE)
        content = {**gpt2_content(), "added_tokens": []}
        backend = package.Tokenizer.from_json_str(json.dumps(content))
        fast = FastTokenizer(backend, f"{PACKAGE} {version(PACKAGE)}")
        fast.encode_documents(["Hello, world!"])
    except ModuleNotFoundError as error:
        if error.name == PACKAGE:
            logger.info(
                "tiktoken tokenizes; the extra fast is faster: pip install 'gpt-lightning[fast]'"
            )
            return None
        _say_unusable(error)
        return None
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of Rust is not an Exception
        _say_unusable(error)
        return None
    return fast


def _say_unusable(error: BaseException) -> None:
    cause = (str(error) or type(error).__name__).splitlines()[0]
    logger.warning(f"{PACKAGE}: cannot be used ({cause}); tiktoken tokenizes instead")
