"""GPT-2's tokenizer in the package ``fastokens`` (extra ``fast``), which is checked against tiktoken all the time.

The bytes that the ids spell are compared with each document. tiktoken encodes a sample of all text, and all of the
first million tokens of a store. The pipeline encodes a shard again where one id differs.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.data.tokenizer import END_OF_TEXT_ID, GPT2, Ids, Tokenizer, merges
from gpt_lightning.data.tokenizer_json import gpt2_content

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

PACKAGE = "fastokens"
MAX_WORKERS = 4  # fastokens keeps up to about 130 MB of encoded words for each thread
CHECKED_TOKENS = 1_000_000  # the first ones of a store, of which tiktoken encodes all
# tiktoken encodes the first bytes of each block, 1.2 %. The size is odd, so that blocks do not begin where a tokenizer
# may divide a long text.
_BLOCK_BYTES = 80_009
_SAMPLE_BYTES = 960
# tiktoken refuses about a million blanks in a row; the texts that may have them are left to it
_MANY_BLANKS = 50_000
# Where pieces that are encoded apart have the tokens of the whole: before white space, after another character. A
# byte of 0x80 or more stands here if no white space of Unicode ends with it.
_CUT = re.compile(rb"[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf](?=[ \n])")
_OTHER_TEXT = "its ids do not spell the text"


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
        import pyarrow

        self.name = name
        self._backend = backend
        tokens = [*GPT2.token_bytes]
        tokens[END_OF_TEXT_ID] = b""  # no text has it
        self._tokens = pyarrow.array(tokens, pyarrow.large_binary())

    def encode_documents(self, texts: Sequence[str], contents: Sequence[bytes]) -> Ids:
        """Token ids of documents with one delimiter between them, as :meth:`Tokenizer.encode_documents` gives them.

        Args:
            contents: The texts in UTF-8.

        Raises:
            DifferenceError: A check failed.
            ValueError: tiktoken refuses a text.
        """
        if not texts or any(map(_may_be_refused, texts)):
            return GPT2.encode_documents(texts)
        ids = self._encode(texts)
        ends = self._ends(ids, b"".join(contents))
        begins = np.cumsum([0, *map(len, contents)])
        bounds = np.searchsorted(ends, begins)
        if not np.array_equal(ends[bounds], begins):
            raise DifferenceError("a token reaches into the next document")
        for begin, document in zip(begins.tolist(), contents, strict=False):
            for start, end in _sample(document, begin):
                self._check_sample(ids, ends, begin + start, document[start:end])
        return np.insert(ids.astype(GPT2.dtype), bounds[1:-1], END_OF_TEXT_ID)

    def _encode(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """All ids of successive documents."""
        try:
            ids, _ = self._backend.encode_batch_flat(texts)
            return np.frombuffer(ids, "<i4")
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of Rust is not an Exception
            raise DifferenceError(f"it fails ({type(error).__name__})") from error

    def _ends(self, ids: NDArray[np.int32], content: bytes) -> NDArray[np.int64]:
        """0, and the offset where each token ends, if the tokens spell ``content``."""
        import pyarrow

        if not ids.size:
            if content:
                raise DifferenceError(_OTHER_TEXT)
            return np.zeros(1, dtype=np.int64)
        if ids.min() < 0 or ids.max() >= END_OF_TEXT_ID:
            raise DifferenceError("an id is not one of text")
        _, offsets, text = self._tokens.take(pyarrow.array(ids)).buffers()
        ends = np.frombuffer(offsets, np.int64, len(ids) + 1)
        if not text.slice(0, int(ends[-1])).equals(pyarrow.py_buffer(content)):
            raise DifferenceError(_OTHER_TEXT)
        return ends

    @staticmethod
    def _check_sample(
        ids: NDArray[np.int32], ends: NDArray[np.int64], start: int, content: bytes
    ) -> None:
        first, last = np.searchsorted(ends, [start, start + len(content)])
        expected = GPT2.encode_documents([content.decode()])
        if not np.array_equal(ids[first:last], expected):
            raise DifferenceError("its ids are not those of tiktoken")


def _sample(content: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """Where the pieces of a document begin and end of which tiktoken's ids are compared.

    A text that cannot be cut is one piece, and so is what follows the last place where it can be.

    Args:
        offset: Where the document begins in the text of which blocks are counted.
    """
    end = 0  # of the last piece
    for block in range(-(offset % _BLOCK_BYTES), len(content), _BLOCK_BYTES):
        start = 0
        if block + _SAMPLE_BYTES <= 0:
            continue
        if block > 0:
            first = _CUT.search(content, block)
            if first is None:
                if end == 0 or len(content) - end > _BLOCK_BYTES:
                    yield end, len(content)
                return
            start = first.end()
        last = _CUT.search(content, start + _SAMPLE_BYTES if block > 0 else block + _SAMPLE_BYTES)
        end = last.end() if last else len(content)
        yield start, end


def _may_be_refused(text: str) -> bool:
    starts = range(0, len(text) - _MANY_BLANKS + 1, _MANY_BLANKS)
    return any(text[at : at + _MANY_BLANKS].isspace() for at in starts)


def load_in_background(tokenizer: Tokenizer) -> Future[FastTokenizer | None] | None:
    """The fast tokenizer, whose loading takes half a second and has begun; ``None`` if there is none.

    The log says why there is none for GPT-2's vocabulary: ``fast`` is not installed or cannot be imported. If loading
    fails, which is rare, the future gives ``None``, and the log says it then.
    """
    if tokenizer is not GPT2 or _package() is None:
        return None
    loader = ThreadPoolExecutor(1)
    try:
        return loader.submit(_gpt2)
    finally:
        loader.shutdown(wait=False)


@cache
def _package() -> Any:
    """The package; ``None`` if it, or pyarrow, is missing or cannot be imported."""
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")  # prepare has its own threads
    packages = ("pyarrow", PACKAGE)
    if any(find_spec(package) is None for package in packages):
        logger.info(
            "tiktoken tokenizes; the extra fast is faster: pip install 'gpt-lightning[fast]'"
        )
        return None
    imported = [_unless_broken(package, partial(import_module, package)) for package in packages]
    return None if None in imported else imported[-1]


def _gpt2_json() -> str:
    """GPT-2's ``tokenizer.json`` without a special token.

    Each merge is one string, as older versions of the file have it: fastokens reads that in half the time.
    """
    content = gpt2_content()
    content["added_tokens"] = []
    content["model"]["merges"] = [" ".join(pair) for pair in merges()]
    return json.dumps(content)


@cache
def _gpt2() -> FastTokenizer | None:
    return _unless_broken(PACKAGE, _load_gpt2)


def _load_gpt2() -> FastTokenizer:
    backend = _package().Tokenizer.from_json_str(_gpt2_json())
    fast = FastTokenizer(backend, f"{PACKAGE} {version(PACKAGE)}")
    fast.encode_documents(["Hello, world!"], [b"Hello, world!"])
    return fast


def _unless_broken(package: str, load: Callable[[], _T]) -> _T | None:
    """What ``load`` returns; ``None`` if it fails, and the log says why."""
    try:
        return load()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of Rust is not an Exception
        cause = (str(error) or type(error).__name__).splitlines()[0]
        logger.warning(f"{package}: cannot be used ({cause}); tiktoken tokenizes instead")
        return None
