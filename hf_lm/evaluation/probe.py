r"""
Does a model know the grammar of the language it was trained on? Minimal pairs (BLiMP's idea, arXiv:1912.00582) made from
real sentences, so that no word list or template decides what is asked.

Method. A text is cut into sentences of 4 to 40 words at `.`, `!`, `?` and blank lines. A rule (`RULES`) finds the first
place where English grammar decides the form of a word or its place, and changes it:

| rule | real | changed |
|---|---|---|
| agreement | he *was* there | he *were* there |
| word_order | in *the ship* | in *ship the* |
| negation | he *did not* see | he *not did* see |
| pronoun_case | it gave *to him* | it gave *to he* |
| article | it was *an* island | it was *a* island |

A pair counts as solved if the model gives the real sentence the higher probability (the sum over all tokens, each
sentence as the start of a text). Chance is one half. The baseline is an interpolated word trigram model (Witten-Bell)
of the text that comes before: what it solves needs no more than counting. Rules look at words, not at parses: a few per
cent of the pairs are not ungrammatical after all (a subjunctive *he were*), for all models alike. The intervals are
Wilson's at 95%.
"""

import math
import re
from collections import Counter, defaultdict

from torch import nn

from ..errors import InputError
from ..generation.prompts import context_limit
from .sentences import score_sentences

CASE = {"him": "he", "me": "I", "them": "they", "us": "we"}
NUMBER = {"was": "were", "is": "are", "has": "have", "does": "do"}
NUMBER |= {plural: singular for singular, plural in NUMBER.items()}

# rule: what to look for, and the change to it
RULES = {
    "agreement": (
        r"\b(?:(?:[Hh]e|[Ss]he|[Ii]t) (?:was|is|has|does)|(?:[Tt]hey|[Ww]e) (?:were|are|have))\b",
        lambda match: " ".join((match[0].split()[0], NUMBER[match[0].split()[1]])),
    ),
    "word_order": (r"(?<= )(the|my|his|their|our) ([a-z]{3,})\b", lambda match: f"{match[2]} {match[1]}"),
    "negation": (
        r"\b(did|do|does|could|would|should|must|was|were|is|are|had|have|has) not\b",
        lambda match: f"not {match[1]}",
    ),
    "pronoun_case": (
        r"\b(to|of|for|with|from|by|upon|at) (him|me|them|us)\b",
        lambda match: f"{match[1]} {CASE[match[2]]}",
    ),
    "article": (r"(?<= )an?(?= [a-z])", lambda match: "a" if match[0] == "an" else "an"),
}


def sentences(text: str) -> list[str]:
    """The sentences of 4 to 40 words of an English text, white space made single."""
    found = (" ".join(part.split()) for part in re.split(r"(?<=[.!?])[\"\u201d\u2019]?\s+|\n\s*\n", text))
    return [part for part in found if 4 <= part.count(" ") + 1 <= 40 and part[0].isupper() and part[-1] in ".!?"]


def minimal_pairs(text: str, per_rule: int = 100) -> dict[str, list[tuple[str, str]]]:
    """For each rule `(real, changed)` sentences, at most `per_rule` of them, evenly spread over the text."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for rule, (pattern, change) in RULES.items():
        changed = ((real, re.sub(pattern, change, real, count=1)) for real in dict.fromkeys(sentences(text)))
        found = [pair for pair in changed if pair[0] != pair[1]]
        count = min(per_rule, len(found))
        pairs[rule] = [found[number * len(found) // count] for number in range(count)]
    return pairs


class WordTrigrams:
    """Interpolated trigram model of words and punctuation (Witten-Bell): what counting alone can know."""

    def __init__(self, text: str):
        self.counts: dict[tuple, Counter] = defaultdict(Counter)
        for sentence in sentences(text):
            for context, word in self._steps(sentence):
                for start in range(3):
                    self.counts[context[start:]][word] += 1
        self.totals = {context: counter.total() for context, counter in self.counts.items()}
        self.uniform = 1 / (len(self.counts[()]) + 1)

    @staticmethod
    def _steps(sentence: str):
        words = ["<s>", "<s>", *re.findall(r"\w+|[^\w\s]", sentence), "</s>"]
        return (((first, second), word) for first, second, word in zip(words, words[1:], words[2:], strict=False))

    def _probability(self, context: tuple, word: str) -> float:
        shorter = self._probability(context[1:], word) if context else self.uniform
        seen = self.counts.get(context)
        if not seen:
            return shorter
        return (seen[word] + len(seen) * shorter) / (self.totals[context] + len(seen))

    def log_probability(self, sentence: str) -> float:
        """`ln P(sentence)`, its end included."""
        return math.fsum(math.log(self._probability(context, word)) for context, word in self._steps(sentence))


def solved(right: list[bool]) -> dict:
    """`accuracy` with Wilson's 95% interval `low`, `high`."""
    count, share, z = len(right), sum(right) / len(right), 1.959964
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return {"accuracy": share, "low": max(0.0, center - half), "high": min(1.0, center + half)}


def probe(
    model: nn.Module, tokenizer, text: str, earlier: str | None = None, per_rule: int = 100, batch_size: int = 8
) -> dict[str, dict]:
    """
    Ask a model minimal pairs made from a text.

    Args:
        text: English text that the model was not trained on.
        earlier: text for the trigram baseline, best the model's own training text; without it, no baseline.

    Returns:
        For each rule, and for `all`: `pairs`, `model` and `trigrams` (see `solved`), `failed`: the pairs the model
        got wrong.

    Raises:
        InputError: the text has no sentence to which a rule applies.
    """
    limit = context_limit(model) or math.inf
    trigrams = WordTrigrams(earlier) if earlier else None
    results: dict[str, dict] = {}
    judged: dict[str, list[bool]] = {"model": [], "trigrams": []}
    for rule, pairs in minimal_pairs(text, per_rule).items():
        pairs = [pair for pair in pairs if all(len(tokenizer(one)["input_ids"]) < limit for one in pair)]
        if not pairs:
            continue
        scores = score_sentences(model, tokenizer, [one for pair in pairs for one in pair], batch_size)
        values = [score.log_probability for score in scores]
        right = {"model": [real > changed for real, changed in zip(values[::2], values[1::2], strict=True)]}
        if trigrams is not None:
            right["trigrams"] = [trigrams.log_probability(a) > trigrams.log_probability(b) for a, b in pairs]
        results[rule] = {"pairs": len(pairs), **{who: solved(answers) for who, answers in right.items()}}
        results[rule]["failed"] = [pair for pair, fine in zip(pairs, right["model"], strict=True) if not fine]
        for who, answers in right.items():
            judged[who] += answers
    if not results:
        raise InputError("the text has no sentence to make a minimal pair of (English prose is needed).")
    totals = {who: solved(answers) for who, answers in judged.items() if answers}
    return {**results, "all": {"pairs": len(judged["model"]), **totals, "failed": []}}
