"""Bytes to text, and text to a terminal: UTF-8, byte order marks, line ends, control characters."""

import codecs
import re
from typing import TextIO

BOM = "\ufeff"  # the byte order mark, EF BB BF in UTF-8

# The first bytes of files in other encodings. UTF-32 comes first: its mark begins with UTF-16's.
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # tab and newline are not
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_LONE_SURROGATE = re.compile(
    r"[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]"
)


def decode_text(content: bytes) -> str:
    """The text of a complete file or stream: UTF-8, without a byte order mark, each line end as ``\\n``.

    Raises:
        ValueError: It is not UTF-8; the message is the cause without a name: ``is not UTF-8 (...)``.
    """
    try:
        return clean_text(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(decoding_problem(error)) from error


def clean_text(text: str) -> str:
    """The text without a byte order mark, with :func:`line_ends`: as Python reads a file as utf-8-sig."""
    return line_ends(text.removeprefix(BOM))


def line_ends(text: str) -> str:
    """The text with ``\\r\\n`` and ``\\r`` as ``\\n``."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def decoding_problem(error: UnicodeDecodeError, at: int | None = None) -> str:
    """Why bytes are not UTF-8. ``at``: the bad byte's offset in its file, if it is not ``error.start``."""
    at = error.start if at is None else at
    if at == 0:
        for mark, encoding in _OTHER_ENCODINGS.items():
            if error.object.startswith(mark):
                return f"is {encoding}, not UTF-8"
    return f"is not UTF-8 (byte {at}: {error.reason})"


def has_other_mark(content: bytes) -> bool:
    """Whether bytes begin with the byte order mark of UTF-16 or UTF-32."""
    return content.startswith(tuple(_OTHER_ENCODINGS))


def utf8_text(text: str) -> str:
    """Text from the command line, JSON or YAML as UTF-8 can hold it: surrogate pairs become one character.

    Raises:
        ValueError: A surrogate is alone. Python reads a byte of the command line that is not UTF-8 as one;
            ``\\ud800`` in JSON is another. The message is the cause without a name.
    """
    if (match := _LONE_SURROGATE.search(text)) is not None:
        code = ord(match[0])
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
        raise ValueError(f"is not valid UTF-8 ({what} at character {match.start()})")
    if _SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def printable(text: str) -> str:
    """The text with control characters but tab and newline as escapes: ESC is ``\\x1b``.

    So is a byte of a path that is not UTF-8.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def for_stream(text: str, stream: TextIO | None) -> str:
    """``text`` as it can be written to ``stream``: :func:`printable` on a terminal, unchanged elsewhere."""
    return printable(text) if stream is not None and stream.isatty() else text
