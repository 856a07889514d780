"""Tokenizers as GGUF files hold them: vocabulary, merges, pre-tokenizer, special tokens and chat templates."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import InputError


def pre_tokenizer_name(definition: dict[str, Any]) -> str:
    """
    What GGUF calls the rule by which a byte-level BPE tokenizer first splits a text.

    Raises:
        InputError: it has no name for this one.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    steps = definition.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if definition["model"]["type"] == "BPE" and kinds and kinds[-1] == "ByteLevel":
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"]:
            split = steps[0]["pattern"].get("Regex")
            for name, known in GGUF_PRE_TOKENIZER_SPLITS.items():
                if split == known:
                    return name
    raise InputError(
        f"GGUF export needs a byte-level BPE tokenizer with a pre-tokenizer that llama.cpp knows; this one is "
        f"{definition['model']['type']} with {' and '.join(map(str, kinds)) or 'none'}."
    )


def add_tokenizer(writer, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: list[int]) -> None:
    """
    Vocabulary, merges, special tokens and chat templates; rows of the embedding without a token are marked unused.

    Args:
        ends: the tokens at which generation ends.

    Raises:
        InputError: a file cannot name all of them.
    """
    from gguf import TokenType

    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {item["id"]: item for item in definition["added_tokens"]}
    vocabulary = {index: token for token, index in definition["model"]["vocab"].items()}
    tokens, types = [], []
    for index in range(vocab_size):
        if index in added:
            tokens.append(added[index]["content"])
            types.append(TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED)
        else:
            tokens.append(vocabulary.get(index, f"[PAD{index}]"))
            types.append(TokenType.NORMAL if index in vocabulary else TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(definition))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = definition["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    ids["unk"] = ids["eos"] if ids["unk"] is None else ids["unk"]  # without one, readers invent a token for it
    more = [index for index in ends if index != ids["eos"]]
    if len(more) > 2:
        raise InputError(f"eos_token_id: a GGUF file names up to three tokens that end a text, got {ends}.")
    ids |= zip(("eot", "eom"), more, strict=False)  # of a turn, of a message
    for name, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    if isinstance(templates := tokenizer.chat_template, dict):
        templates = [{"name": name, "template": template} for name, template in templates.items()]
    if templates is not None:
        writer.add_chat_template(templates)
