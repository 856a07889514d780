"""What stands before new text: a prompt's tokens, and how much room the model has beside them."""

from transformers import PreTrainedTokenizerBase

from ..data.packing import segment_prefix
from ..errors import InputError


def context_limit(model) -> int | None:
    """Return the number of tokens that the model takes at once, or None if there is no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def room_for_answer(model, ids: list[int], max_new_tokens: int, name: str = "prompt") -> int:
    """
    Return the number of new tokens that fit behind a prompt, `max_new_tokens` at most.

    Args:
        ids: the prompt's tokens.
        name: of the prompt, for the error.

    Raises:
        InputError: the prompt is empty, or fills the model's context.
    """
    limit = context_limit(model)
    if not ids:
        raise InputError(f"{name}: must not be empty, because the tokenizer has no token that starts a text.")
    if limit is not None and len(ids) >= limit:
        raise InputError(f"{name}: has {len(ids)} tokens; the model takes {limit}, the new ones included.")
    return max_new_tokens if limit is None else min(max_new_tokens, limit - len(ids))


def context_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Return what stands before a text when it is scored: the tokenizer's own prefix, or, if it has none, bos or eos, so
    that the first token is scored too (as lm-eval does).
    """
    if prefix := segment_prefix(tokenizer):
        return prefix
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if first is None else [first]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """
    Encode a text that is to be continued: the tokenizer's prefix and the text, without eos, which would end it.

    An empty text becomes what starts one.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*segment_prefix(tokenizer), *ids] or context_prefix(tokenizer)
