"""
Translation by a causal language model: `source <|en-de|> translation <eos>`.

The tag is one special token that ends the source and names what comes next; a tokenizer that has it says so itself
which pairs of languages its model translates.
"""

import re
from itertools import groupby

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.packing import segment_prefix
from ..errors import InputError
from ..generation.decoding import GREEDY, generate_batch
from ..generation.prompts import context_limit

logger = logging.get_logger(__name__)

BEAMS = 4
PAIR = re.compile(r"(\w+)-(\w+)")
PLAIN = {"add_special_tokens": False, "split_special_tokens": True}  # a text that spells a tag is text


def tag(pair: str) -> str:
    """The token of a pair such as `en-de`."""
    return f"<|{pair}|>"


def languages(pair: str) -> tuple[str, str]:
    """
    Source and target of `en-de`.

    Raises:
        InputError: not two different languages joined by a hyphen.
    """
    found = PAIR.fullmatch(pair)
    if not found or found[1] == found[2]:
        raise InputError(f"language_pairs: must be two languages as in en-de, got {pair!r}.")
    return found[1], found[2]


def pairs_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The pairs whose tags a tokenizer has, in the order of their ids."""
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
    return [token[2:-2] for token, _ in added if PAIR.fullmatch(token[2:-2]) and token == tag(token[2:-2])]


def choose_pair(pairs: list[str], source: str | None, target: str | None) -> str:
    """
    The one pair with this source and this target; what is None may be anything.

    Raises:
        InputError: there is none, or more than one.
    """
    if not pairs:
        raise InputError("the model translates nothing: its tokenizer has no tag such as <|en-de|>.")
    fitting = [pair for pair in pairs if source in (None, languages(pair)[0]) and target in (None, languages(pair)[1])]
    if len(fitting) == 1:
        return fitting[0]
    asked = " ".join(f"--{name} {value}" for name, value in (("from", source), ("to", target)) if value) or "no --to"
    if fitting:
        raise InputError(f"{asked}: may be {', '.join(fitting)}; say --from and --to.")
    raise InputError(f"{asked}: unknown pair; the model translates {', '.join(pairs)}.")


def encode_sources(tokenizer: PreTrainedTokenizerBase, texts: list[str], pair: str | list[str]) -> list[list[int]]:
    """The prompts of some texts, of one pair or of one each: what the tokenizer puts before a text, the text, the tag."""
    prefix, pairs = segment_prefix(tokenizer), [pair] * len(texts) if isinstance(pair, str) else pair
    ends = tokenizer.convert_tokens_to_ids([tag(one) for one in pairs])
    return [[*prefix, *ids, end] for ids, end in zip(tokenizer(texts, **PLAIN)["input_ids"], ends, strict=True)]


def encode_targets(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """What is to come after the prompts: the translation and eos."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, **PLAIN)["input_ids"]]


@torch.inference_mode()
def translate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    pair: str,
    num_beams: int = BEAMS,
    batch_size: int = 32,
) -> list[str]:
    """
    Translations of some texts, in their order; of an empty text an empty one.

    Texts of like length share a batch, padded on the left; what else is in a batch does not change a translation. It
    has at most twice as many tokens as its source (rounded up to a multiple of 16), and 16 more. A source that leaves
    no room for 16 (or half) of the model's `max_position_embeddings` is cut at its end, which is said.
    """
    prompts = dict(enumerate(encode_sources(tokenizer, texts, pair))) if texts else {}
    prompts = {number: ids for number, ids in prompts.items() if texts[number].strip()}
    limit = context_limit(model) or 1 << 20
    longest_source = limit - min(16, limit // 2)
    too_long = [number for number, ids in prompts.items() if len(ids) > longest_source]
    for number in too_long:
        prompts[number] = [*prompts[number][: longest_source - 1], prompts[number][-1]]
    if too_long:
        logger.warning(f"{len(too_long)} of {len(texts)} texts are too long for the model and cut at their end.")
    translations = [""] * len(texts)
    sizes = {number: min(-(-len(ids) // 16) * 16, longest_source) for number, ids in prompts.items()}
    groups = [list(group) for _, group in groupby(sorted(prompts, key=sizes.get), key=sizes.get)]
    batches = [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
    for batch in batches:
        size = sizes[batch[0]]
        answers = generate_batch(
            model,
            [prompts[number] for number in batch],
            max_new_tokens=min(2 * size + 16, limit - size),
            num_beams=num_beams,
            early_stopping=num_beams > 1,  # a quarter faster, with the same chrF
            **GREEDY,
        )
        for number, ids in zip(batch, answers, strict=True):
            translations[number] = tokenizer.decode(ids, skip_special_tokens=True)
    return translations


def score_translations(translations: list[str], references: list[str], language: str) -> dict:
    """
    Corpus chrF and BLEU (0 to 100) by sacrebleu.

    Args:
        language: of both; `zh` is split into characters for BLEU, all else by sacrebleu's default `13a`.

    Returns:
        `chrf`, `chrf_interval` (95%, by resampling sentences), the same for `bleu`; `signatures`, which say how they
        are counted.
    """
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import PairedTest

    metrics = {"chrF2": CHRF(), "BLEU": BLEU(tokenize="zh" if language == "zh" else "13a")}
    samples = min(1000, max(100, 2_000_000 // len(references)))  # bounds the memory
    signatures, results = PairedTest([("", translations)], metrics, [references], "bs", n_samples=samples)()
    scores: dict = {}
    for name, key in (("chrF2", "chrf"), ("BLEU", "bleu")):
        found = results[name][0]
        interval = [float(found.score - found.ci), float(found.score + found.ci)]
        scores |= {key: found.score, f"{key}_interval": interval}
    return scores | {"signatures": [f"{name}|{signature}" for name, signature in signatures.items()]}
