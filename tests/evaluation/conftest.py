"""A small model with its tokenizer, as objects and as a folder."""

import pytest
import torch

from hf_lm import HfLmConfig, HfLmForCausalLM
from hf_lm.tokenization import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(moby_dick):
    return train_tokenizer([moby_dick[:50_000]], 300)


@pytest.fixture(scope="session")
def model(tokenizer):
    torch.manual_seed(0)
    config = HfLmConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2,
        zero_init_residual=False, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return HfLmForCausalLM(config).eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, model, tokenizer) -> str:
    path = tmp_path_factory.mktemp("evaluated")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
