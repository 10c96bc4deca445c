"""A chunk of an input, about a megabyte, that one thread tokenizes, and the position where the next one starts."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

from gpt_lightning.data.prepare.inputs import InputFile
from gpt_lightning.data.tokenizer import END_OF_TEXT

CHUNK_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 25  # of a line, or of a text without white space
EOT_BYTES = END_OF_TEXT.encode()

Split = Literal["train", "val"]


class ReadPosition(NamedTuple):
    """Where reading resumes: index of the input, offset (uncompressed bytes) or row, lines before it, and the
    split of the document that was read in part."""

    source: int = 0
    offset: int = 0
    line: int = 0
    split: Split | None = None


@dataclass(frozen=True)
class TextChunk:
    """Complete documents, or part of a long one.

    Attributes:
        content: Bytes of a plain text or of lines; a list of rows, or Arrow's array of them.
        at: Position of its start.
        after: Where reading resumes after it.
        done: Bytes on disk that were read so far, of all inputs.
        split: The split of all of it. ``None``: the content, or the offset, of each document decides.
        part: Whether it is a part of a long document; ``begins`` is True for the first part.
        problem: Why the document cannot be read, instead of its content.
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
    """The split of a document by the hash of its content, whatever the other documents are."""
    return "val" if int.from_bytes(digest, "big") < val_ratio * 2**64 else "train"


def content_hash(content: bytes) -> bytes:
    return blake2b(content, digest_size=8).digest()
