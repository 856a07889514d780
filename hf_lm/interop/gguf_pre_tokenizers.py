"""
How llama.cpp splits a text into words before it merges bytes: the rules that `tokenizer.ggml.pre` names.

llama.cpp knows a pre-tokenizer by name only, so an export has to find the name of a tokenizer's rule. Regular expressions
that look different may split alike, and some of llama.cpp's rules differ from the ones they are named after. Therefore
`RULES` holds what llama.cpp does (`src/llama-vocab.cpp`, in the syntax of the package tokenizers), and a name is chosen by
running the tokenizer and the rule on the same texts.
"""

import json
import random
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, pre_tokenizers

from ..errors import InputError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
QWEN2 = rf"{CONTRACTION}|{WORD}|\p{{N}}|{REST}"


def cased(upper: str, lower: str, suffix: str, digits: str) -> str:
    """A word is some upper and then some lower letters; how GPT-4o's and Mistral's newer tokenizers split."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"


# llama.cpp's replacement for classes that C++ lacks: only ASCII letters have a case there, and marks are no letters
ASCII_CASE = (r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])")
TRUE_CASE = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]")
CJK = r"[[一-龥ࠀ-一가-퟿]&&[^\s]]+"
CASED_LETTERS = r"[[\p{Lu}\p{Ll}\p{Lt}]&&[^\x{1D400}-\x{1D7FF}]]"
JAIS_SPACES = "|".join(rf"\s{{{size}}}(?!\S)" for size in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")) + r"|\s{1}"
DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"""| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"""
)


class Rule(NamedTuple):
    """
    What llama.cpp does under one name.

    Args:
        name: value of `tokenizer.ggml.pre`. Of names with the same rule, one that all versions of llama.cpp know.
        splits: regular expressions, each of which splits the pieces that the one before it has left.
        ignores_merges: a word that is a token is that token, whatever the merges say.
        aliases: other names of the rule that files may have.
    """

    name: str
    splits: tuple[str, ...]
    ignores_merges: bool = False
    aliases: tuple[str, ...] = ()

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in self.splits]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    def applied_to(self, definition: dict[str, Any]) -> Tokenizer:
        """A byte-level BPE tokenizer that splits by this rule."""
        tokenizer = variant(definition, {"ignore_merges": self.ignores_merges})
        tokenizer.pre_tokenizer = self.pre_tokenizer()
        return tokenizer


LLAMA3 = (rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}|{REST}",)
RULES = (
    Rule("gpt-2", (GPT2,), aliases=("phi-2", "olmo", "mpt", "jais", "exaone4", "trillion", "gigachat", "mellum")),
    Rule(
        "smollm", (r"\p{N}", GPT2), aliases=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
    ),
    Rule("llama-bpe", LLAMA3, ignores_merges=True, aliases=("llama3", "llama-v3", "falcon3", "pixtral", "lfm2")),
    Rule("dbrx", LLAMA3, aliases=("smaug-bpe", "glm4", "chatglm-bpe")),
    Rule("qwen2", (QWEN2,), aliases=("stablelm2", "hunyuan", "megrez", "grok-2", "solar-open", "bailingmoe")),
    Rule(
        "qwen35",
        (
            rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}",
        ),
    ),
    Rule("tekken", (cased(*ASCII_CASE, "", r"\p{N}"),), ignores_merges=True),
    Rule("gpt-4o", (cased(*ASCII_CASE, f"{CONTRACTION}?", r"\p{N}{1,3}"),)),
    Rule("deepseek-v3", (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_V3), aliases=("hunyuan-dense", "joyai-llm")),
    Rule(
        "deepseek-llm",
        ("[\r\n]", rf"\s?{CASED_LETTERS}+", r"\s?[[!-/:-~！-／：-～‘-‟　-。]&&[^\s]]+", r"\s+$", CJK, r"\p{N}+"),
    ),
    Rule("deepseek-coder", ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}")),
    Rule("bloom", (r" ?[^(\s|[.,!?…。，、।۔،])]+",), aliases=("poro-chat", "gpt3-finnish")),
    Rule("viking", (r" ?[^(\s|[.,!?…。，、।۔،])]+", r"\p{N}")),
    Rule("jais-2", (rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{JAIS_SPACES}",)),
    Rule("seed-coder", (rf"{CONTRACTION}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}",)),
    Rule(
        "exaone-moe",
        (
            rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
    Rule("minicpm5", (r"\p{N}{1,3}", rf"{CONTRACTION}|{WORD}|\p{{N}}+|{REST}"), ignores_merges=True),
    Rule("ufakzeka", (rf"{WORD}|\p{{N}}|{REST}",)),
    Rule("laguna", (r"[^\n]+|[\n]+", QWEN2)),
)
# published pre-tokenizers that llama.cpp follows for most texts only, although their models are always exported so
NEARLY = (
    Rule("tekken", (cased(*TRUE_CASE, "", r"\p{N}"),), ignores_merges=True),
    Rule("gpt-4o", (cased(*TRUE_CASE, f"{CONTRACTION}?", r"\p{N}{1,3}"),)),
    Rule(
        "deepseek-llm",
        ("[\r\n]", rf"\s?{CASED_LETTERS}+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    ),
    Rule("deepseek-coder", ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
)

# one or more characters of each class that a rule may tell apart
PRINTED = (
    "' ’ a b Z é É ß я Я α Ω 你 好 我 ひ カ ー 한 ا ب ก ស ् ु ² ½ Ⅷ ٣ ४ . , ! ? - _ ( ) [ ] { } / \\ \" # $ % & * + "
    "< > = ^ ` | ~ @ ; : 。 ， 、 ！ （ … “ — ¿ § € © → ∑ 😀 ǅ ʰ º ı 𐍈 'S 'VE IT'S 's 't 're 've 'm 'll 'd the The ABC "
    "camelCase Größe нещо 世界 हिन्दी ខ្មែរ 👨\u200d👩\u200d👧 🇩🇪 ✈️ 1 2 12 123 1234 12345 1234567 1a a1 .. ... -- =="
)
WHITE = " |  |   |     |\t|\t\t|\n|\n\n|\n\n\n|\r\n|\r|\u00a0|\u3000|\u2028|\u200b"
ATOMS = (*PRINTED.split(), *WHITE.split("|"))


def probe(atoms: Iterable[str] = ATOMS, number: int = 500, length: int = 6) -> list[str]:
    """Texts in which atoms follow each other in any order, in Unicode's normal form C; always the same."""
    source, atoms = random.Random(0), list(atoms)
    return [unicodedata.normalize("NFC", "".join(source.choices(atoms, k=length))) for _ in range(number)]


def vocabulary_probe(backend: Tokenizer, number: int = 2000) -> list[str]:
    """Tokens alone and in a row, so that a merge across two words of another rule is met."""
    source = random.Random(0)
    added = backend.get_added_tokens_decoder()
    ids = sorted(set(backend.get_vocab(with_added_tokens=False).values()) - set(added))
    ids = source.sample(ids, min(len(ids), number))
    tokens = [text for text in backend.decode_batch([[index] for index in ids]) if text and "\ufffd" not in text]
    return tokens + probe(tokens, number // 2, 4) if tokens else []


def encode(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def variant(definition: dict[str, Any], model: dict[str, Any] | None = None, **parts) -> Tokenizer:
    """
    A tokenizer as llama.cpp has it: without what GGUF cannot say of added tokens.

    Args:
        definition: a `tokenizer.json`.
        model: entries of its model that change.
        parts: entries of the whole that change; serialized ones.
    """
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    changed = definition | {"normalizer": None, "pre_tokenizer": None, "post_processor": None} | parts
    changed["added_tokens"] = [token | plain for token in definition["added_tokens"]]
    changed["model"] = definition["model"] | (model or {})
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if name in changed["model"]:
            changed["model"][name] = None
    return Tokenizer.from_str(json.dumps(changed))


def named_pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer | None:
    """What a file means by the name of a pre-tokenizer: the published rule; None if `RULES` has no such name."""
    found = (rule for rule in (*NEARLY, *RULES) if name in (rule.name, *rule.aliases))
    return next((rule.pre_tokenizer() for rule in found), None)


def words(pre_tokenizer: pre_tokenizers.PreTokenizer, texts: Iterable[str]) -> list[list[str]]:
    return [[word for word, _ in pre_tokenizer.pre_tokenize_str(text)] for text in texts]


def choose(
    candidates: Iterable[Any], build: Callable[[Any], Tokenizer], backend: Tokenizer, strip: str = ""
) -> Any | None:
    """
    The first candidate whose tokenizer gives the tokens of the original, on the probe and on its own vocabulary. Added
    tokens are left out: see `gguf_tokenizers.notes_on`.

    Args:
        strip: characters with which no text of the comparison begins.
    """
    texts = [text.lstrip(strip) if strip else text for text in probe() + vocabulary_probe(backend)]
    added = set(backend.get_added_tokens_decoder())
    pairs = [
        (text, ids) for text, ids in zip(texts, encode(backend, texts), strict=True) if not added.intersection(ids)
    ]

    def agrees(tokenizer: Tokenizer) -> bool:
        return all(tokenizer.encode(text, add_special_tokens=False).ids == ids for text, ids in pairs)

    return next((one for one in candidates if agrees(build(one))), None)


def rule_of(backend: Tokenizer) -> tuple[Rule, bool]:
    """
    llama.cpp's rule for a byte-level BPE tokenizer: one that splits all texts alike or, with this vocabulary, leads to
    the same tokens.

    Returns:
        The rule, and whether it is exact, not one of `NEARLY`.

    Raises:
        InputError: there is none.
    """
    definition = json.loads(backend.to_str())
    texts, ignores_merges = probe(), definition["model"].get("ignore_merges", False)
    expected = words(backend.pre_tokenizer, texts) if backend.pre_tokenizer else None
    rules = sorted(RULES, key=lambda rule: rule.ignores_merges != ignores_merges)

    def alike(rules: Iterable[Rule]) -> Iterator[Rule]:
        return (rule for rule in rules if words(rule.pre_tokenizer(), texts) == expected)

    def chosen(rules: Iterable[Rule]) -> Rule | None:
        return choose(rules, lambda rule: rule.applied_to(definition), backend)

    if found := chosen(alike(rules)) or chosen(rules):
        return found, True
    if found := chosen(alike(NEARLY)):
        return found, False
    steps = definition["pre_tokenizer"] or {"type": "none"}
    kinds = " and ".join(step["type"] for step in steps.get("pretokenizers", [steps]))
    raise InputError(
        f"GGUF export: llama.cpp has no pre-tokenizer that splits as this byte-level BPE tokenizer does ({kinds})."
    )
