"""A tiny model served over real HTTP."""

import pytest
from helpers.models import book_tokenizer, small_model
from helpers.serving import running

from hf_lm.serving import build_app

CONTEXT = 1024
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{{ message['content'] }}\n{% endfor %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    return book_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    free = {"bos_token_id": None, "eos_token_id": None}  # without an eos, answers are as long as they may be
    return small_model(tokenizer, max_position_embeddings=CONTEXT, initializer_range=0.02, **free)


@pytest.fixture(scope="session")
def text(model, tokenizer):
    with running(build_app("whale", model, tokenizer)) as client:
        yield client


@pytest.fixture(scope="session")
def chat(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(folder)
    copy = type(tokenizer).from_pretrained(folder)
    copy.chat_template = TEMPLATE
    with running(build_app("whale", model, copy)) as client:
        yield client
