"""A tiny model served over real HTTP."""

import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from helpers.models import book_tokenizer, small_model

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


@contextmanager
def running(app):
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


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
