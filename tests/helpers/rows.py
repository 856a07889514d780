"""Rows of conversations, translations and labelled texts, as many and as long as a test asks for."""

import json
from pathlib import Path

WORDS = ("whale", "sea", "ship", "captain", "harpoon", "ocean")
# what a task's recipe must say of these rows
KEYS = {
    "chat": {},
    "translation": {"language_pairs": ["en-de", "de-en"]},
    "sequence-classification": {"class_names": ["calm", "wild"]},
    "label-likelihood": {"class_names": ["calm", "wild"]},
}


def row(task: str, number: int, length: int) -> dict:
    """A row of `length` words, that starts with its number."""
    text = f"{number} " + " ".join(WORDS[(number + place) % len(WORDS)] for place in range(length))
    if task == "chat":
        return {"messages": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": text}]}
    if task == "translation":
        return {"en": text, "de": text.upper()}
    return {"text": text, "label": ("calm", "wild")[number % 2]}


def write_rows(path: Path, task: str, count: int, length: int = 6, first: int = 0) -> str:
    """Write rows to a `.jsonl` file and return its path."""
    rows = (json.dumps(row(task, number, length)) for number in range(first, first + count))
    path.write_text("\n".join(rows), encoding="utf-8")
    return str(path)
