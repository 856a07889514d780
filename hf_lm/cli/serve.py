"""Serve a model over HTTP by OpenAI's protocol: text and chat completions, streamed or whole. Ctrl-C ends it."""

import argparse
import importlib.util
import os
import sys

from ..errors import InputError
from .common import add_model_arguments, load_model, load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, dtype="auto")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0 takes a free one (8000)")
    parser.add_argument("--served-model-name", metavar="NAME", help="the model's name in requests (MODEL)")
    parser.add_argument("--api-key", metavar="KEY", help="what clients must send (the environment's HF_LM_API_KEY)")


def run(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.port < 1 << 16:
        raise InputError(f"--port: must be from 0 to 65535, got {arguments.port}.")
    api_key = os.environ.get("HF_LM_API_KEY") if arguments.api_key is None else arguments.api_key
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise InputError("--api-key: must be printable ASCII characters, and at least one.")
    name = arguments.model if arguments.served_model_name is None else arguments.served_model_name
    if not name or not name.isprintable():
        raise InputError(f"--served-model-name: must be printable characters, and at least one, got {name!r}.")
    from transformers.utils import is_serve_available, logging

    if not is_serve_available() or importlib.util.find_spec("llguidance") is None:
        raise InputError('the server is not installed: pip install "hf-lm[serve]".')
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype), load_tokenizer(arguments.model)
    import uvicorn

    from ..generation.conversation import check_template
    from ..serving import build_app

    check_template(tokenizer)

    if api_key is None and arguments.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"Whoever reaches {arguments.host} can use the model: there is no --api-key.", file=sys.stderr)
    logging.set_verbosity_error()  # transformers warns at each request
    uvicorn.run(
        build_app(name, model, tokenizer, api_key),
        host=arguments.host,
        port=arguments.port,
        access_log=False,
        limit_concurrency=256,  # connections, those that wait included; the next ones get a 503
        timeout_graceful_shutdown=3,
    )
    return 0
