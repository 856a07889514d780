"""Serve a model over HTTP by OpenAI's protocol: text and chat completions, streamed or whole. Ctrl-C ends it."""

import argparse
import sys

from ..errors import InputError
from .common import add_model_arguments, load_model, load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, dtype="auto")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0 takes a free one (8000)")


def run(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.port < 1 << 16:
        raise InputError(f"--port: must be from 0 to 65535, got {arguments.port}.")
    from transformers.utils import is_serve_available, logging

    if not is_serve_available():
        raise InputError('the server is not installed: pip install "hf-lm[serve]".')
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype), load_tokenizer(arguments.model)
    import uvicorn

    from ..evaluation.conversation import check_template
    from ..serving import build_app

    check_template(tokenizer)

    if arguments.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"Whoever reaches {arguments.host} can use the model: there is no password.", file=sys.stderr)
    logging.set_verbosity_error()  # upstream warns at each request
    uvicorn.run(
        build_app(arguments.model, model, tokenizer),
        host=arguments.host,
        port=arguments.port,
        access_log=False,
        limit_concurrency=256,  # connections, those that wait included; the next ones get a 503
        timeout_graceful_shutdown=3,
    )
    return 0
