"""Open a page on this machine to try a model: generate, chat, translate or classify, and see what surprised it."""

import argparse
import contextlib
import importlib.util

from ..errors import InputError
from .common import add_model_arguments, load_model, load_tokenizer, require_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, dtype="auto")
    parser.add_argument("--port", type=int, help="port of the page on 127.0.0.1 (a free one from 7860 on)")


def run(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("gradio") is None:
        raise InputError('gradio is not installed: pip install "hf-lm[demo]".')
    require_model(arguments.model)
    from transformers import PreTrainedConfig

    architectures = ()
    with contextlib.suppress(OSError):  # load_model says what is wrong
        architectures = PreTrainedConfig.get_config_dict(arguments.model)[0].get("architectures") or ()
    classifier = any(name.endswith("ForSequenceClassification") for name in architectures)
    auto_class = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
    model, tokenizer = load_model(arguments.model, auto_class, dtype=arguments.dtype), load_tokenizer(arguments.model)
    from ..generation.conversation import check_template
    from ..serving.demo import build_demo

    check_template(tokenizer)
    page = build_demo(arguments.model, model, tokenizer)
    options = {"share": False, "ssr_mode": False, "show_error": True, "footer_links": []}
    page.launch(server_name="127.0.0.1", server_port=arguments.port, **options)
    return 0
