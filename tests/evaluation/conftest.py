"""A small model with its tokenizer, as objects and as a folder."""

import pytest
from helpers.models import book_tokenizer, small_model


@pytest.fixture(scope="session")
def tokenizer():
    return book_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    return small_model(tokenizer)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, model, tokenizer) -> str:
    path = tmp_path_factory.mktemp("evaluated")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
