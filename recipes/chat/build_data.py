"""
Conversations from the sentences of an office suite's help: python recipes/chat/build_data.py

Nothing is invented: every answer is a sentence of the help (recipes/translation/data), word for word.

- "To DO SOMETHING, ..." and "Use A TOOL to DO SOMETHING." answer "How do I DO SOMETHING?".
- Every second of these goes on with "And in German?" or "And in Chinese?"; the answer is the help's own translation.
- One in twelve of the other sentences is asked for as a translation.

The split of each sentence is the one of the source, where no English sentence is in two splits.
"""

import json
import re
from pathlib import Path

from datasets import load_dataset

FOLDER = Path(__file__).parent
SOURCE = FOLDER.parent / "translation" / "data" / "help_en_de_zh.parquet"
QUESTIONS = [r"^To (?P<do>[a-z][^,.:;?!]{4,80}), [^?]+\.$", r"^Use [^.,;:]{3,60}? to (?P<do>[a-z][^.;:]{5,100})\.$"]
LANGUAGES = [("German", "de"), ("Chinese", "zh")]


def conversation(*turns: str) -> dict:
    """Alternating turns, the user's first."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


def conversations(rows: list[dict]) -> list[dict]:
    """All conversations that the rows of one split make, in order."""
    made, asked = [], 0
    for number, row in enumerate(rows):
        language, column = LANGUAGES[number // 2 % 2]
        found = next(filter(None, (re.match(pattern, row["en"]) for pattern in QUESTIONS)), None)
        if found:
            asked += 1
            turns = [f"How do I {found['do']}?", row["en"]]
            if asked % 2:
                turns += [f"And in {language}?", row[column]]
            made.append(conversation(*turns))
        elif number % 12 == 0:
            made.append(conversation(f"Translate into {language}: {row['en']}", row[column]))
    return made


def main() -> None:
    source = load_dataset("parquet", data_files=str(SOURCE), split="train")
    for split in ("train", "validation", "test"):
        made = conversations([row for row in source if row["split"] == split])
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        (FOLDER / "data" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{split}: {len(made)} conversations")


if __name__ == "__main__":
    main()
