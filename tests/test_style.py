"""The field's words: phrases that readers would have to translate do not stand in code, help, messages or guides."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PATHS = ("hf_lm/**/*.py", "hf_lm/**/*.md", "hf_lm/**/*.html", "recipes/guides/*.md", ".github/*.md", "README.md")
FILES = sorted(path for pattern in PATHS for path in REPOSITORY.glob(pattern))
# phrase: what to write
PHRASES = {
    r"\bupstream": "transformers, or the name of the library that is meant",
    r"\b(?<!known to )the library('s)?\b": "transformers, or the name of the library that is meant",
    r"\bso many (rows|tokens|bits|items|batches|seconds|devices|training)\b": "number of ..., N",
    r"\bcomputed twice\b": "recomputed",
    r"\bwhat is dear\b|\bis dear\b": "what costs much to recompute",
    r"\bkept apart by\b|\bgoes by lengths\b": "varlen attention, cumulative sequence lengths",
    r"\bfalls? to pieces\b": "heap fragmentation",
    r"\bsealed\b|\bset aside\b|\bwritten aside\b": "committed, renamed, written in place",
    r"\bgo(es)? on (from|with|over)\b": "resume, continue",
    r"\bproducts? in bfloat16\b": "matmul",
    r"\bwhat is held out\b": "the held-out set, validation",
    r"\bas it was( before)?[.,;)]": "previously, unchanged",
    r"\blikeliest (next )?(token|class)": "most likely token, top-1",
}


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_phrase_that_is_not_the_fields_is_not_used(phrase: str):
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(phrase, line, re.IGNORECASE)
    ]
    assert not found, f"write {PHRASES[phrase]}:\n" + "\n".join(found)
