"""Cleaning of documents: Project Gutenberg's header and footer, blank lines, other scripts, other encodings."""

import json
import random
from pathlib import Path

import pytest

from gpt_lightning.data.prepare.clean import Cleaning, strip_gutenberg
from gpt_lightning.data.token_store import read_manifest
from gpt_lightning.data.tokenizer import decode
from helpers import Command, assert_refused
from token_stores import store_tokens

BODY = """  THE CLOCK

by Somebody

CHAPTER I.

In the end of the year the clock stood still. Project Gutenberg was a press,
and *** the stars *** were out. The end of this chapter.

     *     *     *     *

Two friends started to read an ebook.

THE END"""

HEADERS = {
    "2020": """The Project Gutenberg eBook of The Clock

This eBook is for the use of anyone anywhere in the United States.

Title: The Clock

*** START OF THE PROJECT GUTENBERG EBOOK THE CLOCK ***


""",
    "two lines": """The Project Gutenberg EBook of The Clock

*** START OF THIS PROJECT GUTENBERG EBOOK THE CLOCK, OR THE
LONG HISTORY OF A TOWER ***

""",
    "no spaces": """Project Gutenberg's The Clock, by Somebody

***START OF THE PROJECT GUTENBERG EBOOK THE CLOCK***

""",
    "etext": """*** START OF THE PROJECT GUTENBERG ETEXT OF THE CLOCK ***
""",
    "1995": """**Welcome To The World of Free Plain Vanilla Electronic Texts**

***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***
Why is this "Small Print!" statement here?
*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*

""",
    "1993": """*SMALL PRINT! for COMPLETE SHAKESPEARE*
*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*

""",
    "no article": "*** START OF PROJECT GUTENBERG EBOOK THE CLOCK ***\n\n",
    "four stars": "**** START OF THE PROJECT GUTENBERG EBOOK THE CLOCK ****\n\n",
    "a star in the title": "*** START OF THE PROJECT GUTENBERG EBOOK CL*CK ***\n\n",
    "open": "*** START OF THE PROJECT GUTENBERG EBOOK THE CLOCK\n\n",
    "beginning": "*** Beginning of this Project Gutenberg EBook ***\n\n",
    "curly": "*** START OF THE PROJECT GUTENBERG’S EBOOK ***\n\n",
    "mixed case": "*END*The Small Print! For Public Domain Etexts*Ver.10.04.01*END*\n\n",
    "none": "",
}
FOOTERS = {
    "2020": """

*** END OF THE PROJECT GUTENBERG EBOOK THE CLOCK ***

Updated editions will replace the previous one.
Section 1. General Terms of Use
""",
    "last line": """



End of Project Gutenberg's The Clock, by Somebody

*** END OF THIS PROJECT GUTENBERG EBOOK THE CLOCK ***

***** This file should be named 11.txt or 11.zip *****
""",
    "no spaces": "\n\n***END OF THE PROJECT GUTENBERG EBOOK THE CLOCK***\nmore\n",
    "etext": "\n\nEnd of the Project Gutenberg Etext of The Clock, by\nSomebody and Somebody Else\n\n",
    "the end": "\n\nThe End of the Project Gutenberg Etext of The Clock\n",
    "stars": "\n\n***End of Project Gutenberg's The Clock***\n",
    "small print below": "\n\nEnd of Project Gutenberg's The Clock\n\n\n",
    "none": "",
}


@pytest.mark.parametrize("footer", FOOTERS)
@pytest.mark.parametrize("header", HEADERS)
def test_exactly_header_and_footer_are_removed(header: str, footer: str) -> None:
    assert strip_gutenberg(HEADERS[header] + BODY + FOOTERS[footer]) == BODY


def test_small_print_in_the_footer_is_no_header() -> None:
    small = "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN EBOOKS*Ver.02/11/02*END*\n"
    footer = (
        "\n\n*** END OF THE PROJECT GUTENBERG EBOOK THE CLOCK ***\n\nThe Legal Small Print\n"
        + small
    )
    assert strip_gutenberg(BODY + footer) == BODY
    kept = strip_gutenberg(BODY + "\n\nEnd of Project Gutenberg's The Clock\n\n" + small)
    assert kept.startswith(BODY)


def test_no_text_becomes_empty() -> None:
    text = HEADERS["2020"] + FOOTERS["2020"]
    assert strip_gutenberg(text) == text


def test_share_of_ascii_is_that_before_blank_lines_are_collapsed() -> None:
    text = "é" * 10 + "\n" * 90
    assert Cleaning(min_ascii=0.9).clean(text)[0] == text
    assert Cleaning(min_ascii=0.9, collapse_blank_lines=True).clean(text)[0] == "é" * 10 + "\n\n"


def test_utf_16_is_not_read_with_the_fallback(command: Command) -> None:
    Path("a.txt").write_bytes("Plain words. ".encode("utf-16") * 9)
    result = command("prepare", "a.txt", "--out=out", "--gutenberg", "--val_ratio=0")
    assert_refused(result, "a.txt: is UTF-16, not UTF-8")


def test_one_book_is_cut_by_ratio(command: Command) -> None:
    words = " ".join(f"word{i}" for i in range(1000))
    Path("a.txt").write_text(HEADERS["2020"] + words + FOOTERS["2020"], encoding="utf-8")
    result = command(
        "prepare", "a.txt", "--out=out", "--gutenberg", "--split=ratio", "--val_ratio=0.2"
    )
    assert result.code == 0, result.err
    train, val = (decode(ids) for ids in store_tokens(Path("out")))
    assert train + val == words
    assert 0.1 < len(val) / len(words) < 0.3


def test_several_books_in_one_file_with_a_byte_order_mark(command: Command) -> None:
    book = HEADERS["2020"] + BODY + FOOTERS["last line"]
    content = f"\ufeff{book}<|endoftext|>{book}".encode()
    Path("a.txt").write_bytes(content)
    result = command("prepare", "a.txt", "--out=out", "--gutenberg", "--val_ratio=0", "--json")
    assert json.loads(result.out)["cleaned"]["header_or_footer_removed"] == 2
    assert decode(store_tokens(Path("out"))[0]) == f"{BODY}<|endoftext|>{BODY}"


def test_a_book_may_quote_the_markers() -> None:
    quoting = (
        BODY + HEADERS["2020"].rstrip() + BODY + "\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\n\n" + BODY
    )  # fmt: skip
    assert strip_gutenberg(HEADERS["two lines"] + quoting + FOOTERS["last line"]) == quoting


@pytest.mark.parametrize("seed", range(50))
def test_nothing_of_a_random_text_is_removed(seed: int) -> None:
    rng = random.Random(seed)
    words = ["Project", "Gutenberg", "***", "START", "END", "of", "the", "this", "EBook", "\n", "a"]
    body = "x " + " ".join(rng.choices(words, k=2000)) + " x"
    parts = [HEADERS[rng.choice(["2020", "no spaces"])], body, FOOTERS["2020"]]
    expected = strip_gutenberg(body)  # may by chance hold a marker
    assert strip_gutenberg("".join(parts)) in (body, expected)


def test_share_of_ascii_counts_characters() -> None:
    cleaning = Cleaning(min_ascii=0.9)
    assert cleaning.clean("a" * 9 + "é")[0] is not None
    assert cleaning.clean("a" * 8 + "éé")[0] is None
    assert Cleaning().clean("éé")[0] == "éé"


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Books in the form of Gutenberg's: two in UTF-8, one in Latin-1, one in Greek."""
    folder = tmp_path / "books"
    folder.mkdir()
    for name, header, footer in (("a", "2020", "last line"), ("b", "none", "none")):
        text = HEADERS[header] + BODY.replace("CLOCK", name) + FOOTERS[footer]
        (folder / f"{name}.txt").write_bytes(text.replace("\n", "\r\n").encode())
    latin = HEADERS["1995"] + "Le café à côté.\n\n\n \n" + "Plain words. " * 20 + FOOTERS["etext"]
    (folder / "c.txt").write_bytes(latin.encode("latin-1"))
    greek = HEADERS["2020"] + "Μῆνιν ἄειδε θεά " * 50 + FOOTERS["2020"]
    (folder / "d.txt").write_bytes(greek.encode())
    return folder


def test_gutenberg_sets_the_four_options(command: Command, books: Path) -> None:
    out = ["--val_ratio=0", "--json"]
    one = json.loads(command("prepare", str(books), "--out=one", "--gutenberg", *out).out)
    four = json.loads(
        command(
            "prepare", str(books), "--out=four", "--strip_gutenberg", "--collapse_blank_lines",
            "--min_ascii=0.9", "--fallback_encoding=latin-1", *out,
        ).out
    )  # fmt: skip
    assert one["settings"] == four["settings"]
    assert one["cleaned"] == {
        "header_or_footer_removed": 2,
        "decoded_by_fallback": 1,
        "too_little_ascii": 1,
    }
    assert store_tokens(Path("one")) == store_tokens(Path("four"))
    texts = decode(store_tokens(Path("one"))[0]).split("<|endoftext|>")
    collapsed = BODY.replace("\n\n     *", "\n\n     *")
    assert texts[:2] == [collapsed.replace("CLOCK", "a"), collapsed.replace("CLOCK", "b")]
    assert texts[2] == ("Le café à côté.\n\n" + "Plain words. " * 20).rstrip()
    assert read_manifest(Path("one"))["cleaned"] == one["cleaned"]


def test_counts_are_said(command: Command, books: Path) -> None:
    result = command("prepare", str(books), "--out=out", "--gutenberg", "--val_ratio=0")
    assert result.code == 0, result.err
    assert "of 3 documents for training" in result.out
    for part in (
        "Gutenberg's header or footer removed from 2",
        "1 not in UTF-8 read as latin-1",
        "1 with less than 90% ASCII left out",
    ):
        assert part in result.out


def test_options_hold_for_rows_too(command: Command) -> None:
    rows = [{"text": HEADERS["2020"] + "One.\n\n\n\nTwo." + FOOTERS["2020"]}, {"text": "é" * 9}]
    Path("a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    result = command("prepare", "a.jsonl", "--out=out", "--gutenberg", "--val_ratio=0", "--json")
    assert json.loads(result.out)["cleaned"]["too_little_ascii"] == 1
    assert decode(store_tokens(Path("out"))[0]) == "One.\n\nTwo."


def test_other_options_are_another_store(command: Command, books: Path) -> None:
    arguments = ["prepare", str(books / "a.txt"), "--out=out", "--val_ratio=0"]
    assert command(*arguments).code == 0
    assert command(*arguments).code == 0  # already prepared
    result = command(*arguments, "--strip_gutenberg")
    assert result.code == 2
    assert "was started without --strip_gutenberg, not with --strip_gutenberg" in result.err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--min_ascii=1.5", "min_ascii: 1.5 is not a share"),
        ("--min_ascii=-0.1", "min_ascii: -0.1 is not a share"),
        ("--fallback_encoding=latin-99", "fallback_encoding: latin-99 is not an encoding of text"),
        ("--fallback_encoding=hex", "fallback_encoding: hex is not an encoding of text"),
        ("--min_ascii=1", "holds no document with text"),
    ],
)
def test_bad_values_are_one_line_and_write_nothing(
    command: Command, argument: str, message: str
) -> None:
    Path("a.txt").write_text("é" * 100, encoding="utf-8")
    result = command("prepare", "a.txt", "--out=out", "--val_ratio=0", argument)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert message in result.err
    assert not Path("out").exists()
