"""GPT-2's tokenizer in the package ``fastokens`` (extra ``fast``), which is checked against tiktoken all the time.

The bytes that the ids spell are compared with each document. tiktoken encodes a sample of every megabyte, and all of
the first million tokens of a store. The pipeline encodes a shard again where one id differs.
"""

import json
import logging
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
CHECKED_TOKENS = 1_000_000  # the first ones of a store, of which tiktoken encodes all
# tiktoken encodes the first bytes of each block of an input, 1.6 %
_BLOCK_BYTES = 1 << 15
_SAMPLE_BYTES = 1 << 9
# tiktoken refuses about a million blanks in a row; the texts that may have them are left to it
_MANY_BLANKS = 50_000
# Where pieces that are encoded apart have the tokens of the whole: before white space, after another character. A
# byte of 0x80 or more stands here if no white space of Unicode ends with it.
_CUT = re.compile(rb"[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf](?=[ \n])")
_WORD = 8  # bytes that are compared at once


class DifferenceError(ValueError):
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
        self._lengths = np.array([len(token) for token in tokens], dtype=np.int64)
        # the bytes of each token in words of 8, and which bits of a word are the token's
        width = -(-self._lengths.max() // _WORD) * _WORD
        table = b"".join(token.ljust(width, b"\0") for token in tokens)
        used = b"".join((b"\xff" * len(token)).ljust(width, b"\0") for token in tokens)
        self._words = np.frombuffer(table, dtype="<u8").reshape(len(tokens), -1).T.copy()
        self._masks = np.frombuffer(used, dtype="<u8").reshape(len(tokens), -1).T.copy()

    def encode_documents(self, texts: Sequence[str], offsets: Sequence[int]) -> Ids:
        """Token ids of documents with one delimiter between them, as :meth:`Tokenizer.encode_documents` gives them.

        Args:
            offsets: Where each text begins in its input. It decides which of its bytes are the sample.

        Raises:
            DifferenceError: A check failed.
            ValueError: tiktoken refuses a text.
        """
        if not texts or any(map(_may_be_refused, texts)):
            return GPT2.encode_documents(texts)
        contents = [text.encode() for text in texts]
        ids, bounds = self._encode(list(texts))
        ends = self._ends(ids, b"".join(contents))
        begins = np.cumsum([0, *map(len, contents)])
        if not np.array_equal(ends[bounds], begins):
            raise DifferenceError("a token reaches into the next document")
        for begin, content, offset in zip(begins, contents, offsets, strict=False):
            for start, end in _sample(content, offset):
                self._check_sample(ids, ends, int(begin) + start, content[start:end])
        return np.insert(ids, bounds[1:-1], END_OF_TEXT_ID).astype(GPT2.dtype)

    def _encode(self, texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """All ids, and the index of each text's first one with the number of all at the end."""
        try:
            ids, bounds = self._backend.encode_batch_flat(texts)
            ids = np.frombuffer(ids, dtype="<u4")
            bounds = np.frombuffer(bounds, dtype="<u8").astype(np.int64)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of Rust is not an Exception
            raise DifferenceError(f"it fails ({type(error).__name__})") from error
        if (
            len(bounds) != len(texts) + 1
            or bounds[0] != 0
            or bounds[-1] != len(ids)
            or (np.diff(bounds) < 0).any()
        ):
            raise DifferenceError("its ids are not those of the documents")
        return ids, bounds

    def _ends(self, ids: NDArray[np.uint32], content: bytes) -> NDArray[np.int64]:
        """0, and the offset where each token ends, if the tokens spell ``content``."""
        if ids.size and ids.max() >= END_OF_TEXT_ID:
            raise DifferenceError("an id is not one of text")
        index = ids.astype(np.intp)
        lengths = self._lengths.take(index)
        ends = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(lengths, out=ends[1:])
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


def _sample(content: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """Where the pieces of a document begin and end of which tiktoken's ids are compared.

    A text that cannot be cut is one piece.
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
        package = import_module(PACKAGE)
        content = {**gpt2_content(), "added_tokens": []}
        backend = package.Tokenizer.from_json_str(json.dumps(content))
        fast = FastTokenizer(backend, f"{PACKAGE} {version(PACKAGE)}")
        fast.encode_documents(["Hello, world!"], [0])
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
