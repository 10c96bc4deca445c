"""What a thread of ``prepare`` tokenises by itself: about a megabyte of a source, and where reading goes on after it."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

from gpt_lightning.data.prepare.inputs import InputFile
from gpt_lightning.data.tokenizer import END_OF_TEXT

CHUNK_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 25  # bytes of a line, or of a text without a place to cut
EOT_BYTES = END_OF_TEXT.encode()

Split = Literal["train", "val"]


class ReadPosition(NamedTuple):
    """Where reading goes on: source, offset (uncompressed bytes) or row, lines before it, and the split of
    the document it is in the middle of."""

    source: int = 0
    offset: int = 0
    line: int = 0
    split: Split | None = None


@dataclass(frozen=True)
class TextChunk:
    """Whole documents, or part of a long one.

    Attributes:
        content: Bytes of a plain text or of lines; a list of rows, or Arrow's array of them.
        at: Where it begins.
        after: Where reading goes on after it.
        split: Where all of it goes; none: each document's content, or offset, decides.
        part: Of a long document; ``begins`` is the first of its parts.
        problem: Why the document cannot be read, in place of its content.
        done: Bytes on disk that were read up to here.
    """

    source: InputFile
    content: Any
    at: ReadPosition
    after: ReadPosition
    done: int
    split: Split | None = None
    part: bool = False
    begins: bool = True
    problem: str | None = None


def split_of(digest: bytes, val_ratio: float) -> Split:
    """The split of a document by the sum of its content: other documents have no say."""
    return "val" if int.from_bytes(digest, "big") < val_ratio * 2**64 else "train"


def content_hash(content: bytes) -> bytes:
    return blake2b(content, digest_size=8).digest()
