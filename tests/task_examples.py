"""Small files of the tasks."""

import json
from pathlib import Path

ROWS = [
    {"ctx": f"The {noun} is", "endings": ["red.", "large and old.", "a thing."], "label": n % 3}
    for n, noun in enumerate(["house", "river", "old garden", "picture", "dog"])
]
TEXTS = [{"text": "She gave the book to her friend"}, {"text": "A dog saw another dog"}]
PAGES = " = One = \n \n It is a page , and it is not so very short that one window holds it . \n = Two = \n \n Another one . \n"


def write_tasks(folder: Path, copies: int = 1) -> dict[str, str]:
    """Write a file of each task, with ``copies`` of its examples; return their paths by task."""
    contents = {
        "choices.jsonl": "\n".join(map(json.dumps, ROWS * copies)),
        "texts.jsonl": "\n".join(map(json.dumps, TEXTS * copies)),
        "pages.txt": PAGES * copies,
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    names = ("hellaswag", "lambada", "wikitext")
    return {task: str(folder / name) for task, name in zip(names, contents, strict=True)}
