"""Tiny models with their tokenizers."""

from pathlib import Path

import torch
from contract.harness.tested_configs import tiny_config
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_lm import HfLmConfig, HfLmForCausalLM, train_tokenizer

EXACT = {"rtol": 1e-4, "atol": 2e-5}
MOBY_DICK = Path(__file__).parents[2] / "recipes" / "moby_dick" / "data" / "moby_dick.txt"


def book_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A new byte-level BPE of the beginning of *Moby-Dick*; its special tokens are <|bos|>, <|eos|> and <|pad|>."""
    return train_tokenizer([MOBY_DICK.read_text(encoding="utf-8")[:50_000]], vocab_size)


def small_model(tokenizer: PreTrainedTokenizerFast, cls: type = HfLmForCausalLM, **changes) -> PreTrainedModel:
    """A seeded model for the tokenizer, in evaluation mode, whose output depends on all it reads."""
    torch.manual_seed(0)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    weights = {"zero_init_residual": False, "initializer_range": 0.2}
    return cls(HfLmConfig(**{"vocab_size": len(tokenizer), **sizes, **weights, **special, **changes})).eval()


def save_small_model(folder, tokenizer: PreTrainedTokenizerFast, cls: type = HfLmForCausalLM, **changes) -> str:
    """Save `small_model` and the tokenizer into a folder; return the folder."""
    small_model(tokenizer, cls, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build(name: str = "default", attention: str = "eager", **changes) -> HfLmForCausalLM:
    """A seeded model with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(0)
    changes = {"initializer_range": 0.2, **changes}
    return HfLmForCausalLM._from_config(tiny_config(name, **changes), attn_implementation=attention).eval()


def draw_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(seed))
