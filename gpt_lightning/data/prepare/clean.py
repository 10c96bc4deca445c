"""Cleaning of documents before they are tokenized, for books of Project Gutenberg and any other text."""

import re
from dataclasses import dataclass

from gpt_lightning.data.unicode import has_other_mark

# of a document, where a marker may be: Gutenberg's longest header has 12,000 characters, its license 20,000
_MARGIN = 60_000

_BOOK = r"(?:(?:the|this)\s+)?(?:copyrighted\s+)?project\s+gutenberg(?:['’]s)?\s+(?:copyrighted\s+)?e-?(?:book|text)"
_REST = r"(?:[^*\n]|\*(?!\*)|\n(?!\s*\n)){0,500}?"  # a title, also of several lines or with a star, but no blank line
# *** START OF THE PROJECT GUTENBERG EBOOK TITLE ***, or without the last stars
_START = re.compile(
    rf"^[^\S\n]*\*{{2,}}\s*(?:start|beginning)\s+of\s+{_BOOK}(?:{_REST}\*{{2,}})?[^\n]*$",
    re.IGNORECASE | re.MULTILINE,
)
# *END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*, before 2003
_SMALL_PRINT = re.compile(
    r"^[^\S\n]*\*END[^\n]{0,5}THE\s+SMALL\s+PRINT![^\n]*$", re.IGNORECASE | re.MULTILINE
)
# *** END OF THE PROJECT GUTENBERG EBOOK TITLE ***
_END = re.compile(rf"^[^\S\n]*\*{{2,}}\s*end\s+of\s+{_BOOK}", re.IGNORECASE | re.MULTILINE)
# End of Project Gutenberg's TITLE, by AUTHOR: the last paragraph of a book
_LAST_LINE = re.compile(
    r"^[^\S\n]*\**(?:the\s+)?end\s+of\s+(?:(?:the|this)\s+)?project\s+gutenberg(?:['’]s)?\b(?:[^\n]|\n(?!\s*\n)){0,500}\s*\Z",
    re.IGNORECASE | re.MULTILINE,
)
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Cleaning:
    """What is done to each document, in this order.

    Attributes:
        fallback_encoding: Encoding of documents that are not UTF-8; ``None``: they are not read.
        strip_gutenberg: Remove Project Gutenberg's header and footer, with its license.
        min_ascii: Leave out documents of which less than this share of the characters is ASCII.
        collapse_blank_lines: Make one blank line of several.

    Raises:
        ValueError: A value cannot be used.
    """

    fallback_encoding: str | None = None
    strip_gutenberg: bool = False
    min_ascii: float = 0.0
    collapse_blank_lines: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_ascii <= 1.0:
            raise ValueError(f"min_ascii: {self.min_ascii} is not a share; give one from 0 to 1")
        if self.fallback_encoding is not None and not _is_text_encoding(self.fallback_encoding):
            raise ValueError(
                f"fallback_encoding: {self.fallback_encoding} is not an encoding of text; give one, such as latin-1"
            )

    @property
    def is_on(self) -> bool:
        return self != Cleaning()

    def decode(self, content: bytes) -> tuple[str, bool]:
        """Return the text of bytes, and whether it was read with the fallback encoding.

        Raises:
            UnicodeDecodeError: They are not UTF-8, and there is no fallback, or it does not fit either. Text that
                begins with the mark of UTF-16 or UTF-32 is never read with the fallback.
        """
        try:
            return content.decode(), False
        except UnicodeDecodeError:
            if self.fallback_encoding is None or has_other_mark(content):
                raise
            return content.decode(self.fallback_encoding), True

    def clean(self, text: str) -> tuple[str | None, bool]:
        """Return the cleaned text, or ``None`` if it is left out, and whether a header or a footer was removed."""
        stripped = strip_gutenberg(text) if self.strip_gutenberg else text
        if self._has_little_ascii(stripped):
            return None, False
        if self.collapse_blank_lines:
            return _BLANK_LINES.sub("\n\n", stripped), stripped != text
        return stripped, stripped != text

    def _has_little_ascii(self, text: str) -> bool:
        if not self.min_ascii or not text:
            return False
        return len(text.encode("ascii", "ignore")) < self.min_ascii * len(text)


def strip_gutenberg(text: str) -> str:
    """Return a book without Project Gutenberg's header, which ends with a start marker, and without its footer.

    The first start marker and the last end marker count: a book may quote them. The blank lines beside them are removed
    too. A text without markers does not change, and no text becomes empty.
    """
    body = text
    if (header := _header(text)) is not None:
        body = re.sub(r"\A(?:[^\S\n]*\n)+", "", text[header.end() :])
    ends = list(_END.finditer(body, max(0, len(body) - _MARGIN)))
    if ends:
        body = body[: ends[-1].start()].rstrip()
    if last_line := _LAST_LINE.search(body, max(0, len(body) - 1000)):
        body = body[: last_line.start()].rstrip()
    return body if body.strip() else text


def _header(text: str) -> re.Match[str] | None:
    """The marker at the end of the header. Some books have the small print in the footer: it is no header there."""
    if (start := _START.search(text, 0, _MARGIN)) is not None:
        return start
    small_print = _SMALL_PRINT.search(text, 0, _MARGIN)
    if small_print is None or _END.search(text, 0, small_print.start()):
        return None
    before = text[: small_print.start()]
    is_footer = re.search(
        r"^\W*(?:the\s+)?end\s+of\s+(?:(?:the|this)\s+)?project\s+gutenberg",
        before,
        re.IGNORECASE | re.MULTILINE,
    )
    return None if is_footer else small_print


def _is_text_encoding(name: str) -> bool:
    try:
        " ".encode(name)  # an empty text is encoded by any name
    except (LookupError, ValueError):
        return False
    return True
