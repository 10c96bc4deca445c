"""Files of the tasks: their forms, and what is wrong in a damaged one."""

import bz2
import gzip
import json
from pathlib import Path

import pytest

from gpt_lightning.evals.task_files import read_choices, read_last_words, read_pages

ROW = {
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "endings": ["is [step] using wrap.", "is ripping tiles.", "holds a cube.", "starts."],
    "label": 3,
}


def write(tmp_path: Path, *lines: object) -> str:
    path = tmp_path / "task.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


def test_official_hellaswag_gets_the_texts_of_the_harness(tmp_path: Path) -> None:
    header = {**ROW, "ctx_a": "[header] How to fly [title] Run.", "ctx_b": "", "label": "0"}
    first, second = read_choices(write(tmp_path, ROW, "", header))
    assert first.context == "Roof shingle removal: A man is sitting on a roof. He"
    assert first.endings == ("is using wrap.", "is ripping tiles.", "holds a cube.", "starts.")
    assert (first.label, second.label) == (3, 0)
    assert second.context == "Roof shingle removal: How to fly. Run."


def test_other_multiple_choice_is_read_as_it_is(tmp_path: Path) -> None:
    row = {"ctx": "Two [and] two is", "endings": ["four", "five  six"], "label": 0}
    (example,) = read_choices(write(tmp_path, row))
    assert (example.context, example.endings) == ("Two [and] two is", ("four", "five  six"))


@pytest.mark.parametrize("compress", [bytes, bz2.compress, gzip.compress])
def test_six_lines_per_example_are_read(tmp_path: Path, compress: object) -> None:
    assert callable(compress)
    path = tmp_path / "task"
    path.write_bytes(compress(b"A roof. he\n1\na.\nb.\nc.\nd.\nB\r\n0\r\ne\nf\ng\nh\n"))
    first, second = read_choices(str(path))
    assert (first.context, first.endings, first.label) == (
        "A roof. he",
        ("a.", "b.", "c.", "d."),
        1,
    )
    assert (second.context, second.label) == ("B", 0)


def test_last_word_is_that_of_the_harness(tmp_path: Path) -> None:
    (example,) = read_last_words(write(tmp_path, {"text": "She said hello to\nher  friend"}))
    assert (example.context, example.word) == ("She said hello to\nher ", "friend")


def test_pages_begin_with_their_titles(tmp_path: Path) -> None:
    text = " \n = A = \n \n a b \n = = Part = = \n c \n = = = D = = = \n = E = \n e \n"
    (tmp_path / "wiki.txt").write_text(text, encoding="utf-8")
    first, second = read_pages(str(tmp_path / "wiki.txt"))
    assert first == " = A = \n \n a b \n = = Part = = \n c \n = = = D = = = "
    assert second == " = E = \n e \n"
    (tmp_path / "plain.txt").write_text("no titles\nat all", encoding="utf-8")
    assert read_pages(str(tmp_path / "plain.txt")) == ["no titles\nat all"]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ({**ROW, "label": 4}, "line 2: label is 4, outside 0 to 3"),
        ({**ROW, "label": -1}, "line 2: label is -1, outside"),
        ({**ROW, "label": "x"}, "line 2: label is 'x', outside"),
        ({**ROW, "label": True}, "line 2: label is True, outside"),
        ({**ROW, "label": 1.0}, "line 2: label is 1.0, outside"),
        ({**ROW, "label": ""}, "line 2: label is missing"),
        ({**ROW, "endings": ["a", " ", "b"]}, "line 2: ending 1 is empty"),
        ({**ROW, "endings": ["a", "b", "[x]"]}, "line 2: ending 2 is empty"),
        ({**ROW, "endings": ["a"]}, "line 2: has fewer than two endings"),
        ({**ROW, "endings": ["a", 3]}, "line 2: endings are not all text"),
        ({**ROW, "endings": "a"}, "line 2: endings is not a list"),
        ({**ROW, "ctx_a": None}, "line 2: ctx_a is not text"),
        ({"endings": ["a", "b"], "label": 0}, "line 2: has no ctx"),
        ({"ctx": "a", "label": 0}, "line 2: has no endings"),
        ('{"ctx": "a", ', "line 2: is not JSON"),
        ("[" * 100_000, "line 2: is not JSON"),
        ("[1]", "line 2: is not a JSON object"),
        ("{'a': 1}", "line 2: is not JSON"),
        ('{"label": ' + "1" * 5000 + "}", "line 2: is not JSON (a number with too many digits)"),
        (r'{"ctx": "a \ud800", "endings": []}', r"line 2: ctx is not valid UTF-8 (\ud800 at"),
        ({**ROW, "ctx_b": "\udcff"}, "line 2: ctx_b is not valid UTF-8"),
        ({**ROW, "endings": ["a", "b\ud800"]}, "line 2: ending 1 is not valid UTF-8"),
    ],
)
def test_damaged_choice_is_refused_with_its_line(tmp_path: Path, line: object, cause: str) -> None:
    with pytest.raises(ValueError, match=r"^[^;]*; [a-z ]+$") as error:
        read_choices(write(tmp_path, ROW, line))
    assert f"task.jsonl, {cause}" in str(error.value)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("a\n0\nb\nc\nd\ne\nf", "is neither JSON lines nor 6 lines per example (7 lines)"),
        ("a\n0\nb\nc\nd\ne\na\n7\nb\nc\nd\ne", "lines 7 to 12: label is '7', outside 0 to 3"),
        ("a\n0\nb\nc\n\ne", "lines 1 to 6: ending 2 is empty"),
        (" \n", "has no examples"),
        ("", "has no examples"),
    ],
)
def test_damaged_lines_are_refused(tmp_path: Path, content: str, cause: str) -> None:
    path = tmp_path / "task.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="; ") as error:
        read_choices(str(path))
    assert cause in str(error.value)


@pytest.mark.parametrize("text", ["word", "ends with a blank ", "", "no word \n"])
def test_text_without_last_word_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="line 1: text does not end with a blank and a word"):
        read_last_words(write(tmp_path, {"text": text}))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (bz2.compress(b"text" * 99)[:-9], "is damaged"),
        (gzip.compress(b"text" * 99, mtime=0)[:-9], "is damaged"),
        (b"\xff\xfea\0", "is UTF-16"),
        (b"caf\xe9", "is not UTF-8"),
        (b"\n \n", "has no examples"),
    ],
)
def test_unreadable_file_is_refused(tmp_path: Path, content: bytes, cause: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=cause):
        read_pages(str(tmp_path / "file"))
