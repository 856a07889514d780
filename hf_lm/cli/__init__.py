"""
The `hf-lm` command. One thin module for each sub-command: `add_arguments(parser)` and `run(arguments) -> exit code`.

To add a command, add its module here and a line to `COMMANDS`. Modules are imported only when they are called, and
import torch only inside `run`, so that help and usage errors answer at once.

Exit codes: 0 success, 1 failure or crash, 2 invalid input, 130 interrupted. An error is one line on standard error; that
of a crash names the file that holds the traceback.
"""

import argparse
import importlib
import os
import re
import sys

from .. import __version__
from ..errors import Failure, is_invalid_input, keep_traceback, one_line
from ..synonyms import closest

# command: (module in this folder, what it does)
COMMANDS = {
    "tokenizer": ("tokenizer", "train a tokenizer on text files"),
    "train": ("train", "train or fine-tune a model from a YAML recipe"),
    "plan": ("plan", "what a recipe will cost: memory, time, energy, money"),
    "generate": ("generate", "continue a prompt"),
    "translate": ("translate", "translate texts by a model trained on pairs of languages"),
    "chat": ("chat", "talk to a model in the terminal"),
    "evaluate": ("evaluate", "bits per byte and perplexity of a model on a text"),
    "score": ("score", "log-probability of sentences and of each of their tokens"),
    "probe": ("probe", "minimal pairs of English grammar, against chance and a trigram model"),
    "lm-eval": ("lm_eval", "run tasks of the lm-evaluation-harness"),
    "serve": ("serve", "serve a model over HTTP by OpenAI's protocol"),
    "demo": ("demo", "open a page on this machine to try a model"),
    "inspect": ("inspect_", "look inside: attention, logit lens, attributions, head ablation as a page"),
    "import": ("import_", "make an hf_lm folder of a Llama, Qwen, Mistral, GPT-2, ... checkpoint"),
    "export": ("export", "hand a model on as a native checkpoint, GGUF or ONNX"),
    "merge": ("merge", "take a LoRA adapter into the weights of its base model"),
    "doctor": ("doctor", "check a model folder against what users trip over"),
    "push": ("push", "upload a model folder to the Hub, after checking it"),
    "card": ("card", "write the model card from the measurements in a model folder"),
}
# Other tools' names of what a command here does.
COMMAND_NAMES = {
    "train": "finetune fine-tune fit pretrain sft resume",
    "plan": "estimate cost budget",
    "tokenizer": "tokenize",
    "generate": "complete infer inference predict run sample",
    "evaluate": "eval test perplexity ppl validate",
    "lm-eval": "benchmark harness",
    "serve": "server api deploy",
    "demo": "ui web gradio playground",
    "inspect": "explain visualize",
    "import": "download convert-from load",
    "export": "quantize convert gguf onnx",
    "merge": "merge-lora fuse",
    "doctor": "check lint verify",
    "push": "upload publish share",
}


class _Parser(argparse.ArgumentParser):
    """Names the closest command where one is unknown."""

    def error(self, message: str):
        if found := re.search(r"argument COMMAND: invalid choice: '([^']*)'", message):
            command = closest(found[1], COMMANDS, COMMAND_NAMES)
            hint = f"; did you mean hf-lm {command}?" if command else f"; there are {', '.join(COMMANDS)}."
            message = f"unknown command {found[1]!r}{hint}"
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `hf-lm` itself; the arguments of a command belong to its module."""
    parser = _Parser(
        prog="hf-lm",
        description="Train, use and share a Transformer language model of the Hugging Face ecosystem.",
        epilog="hf-lm COMMAND --help shows the arguments of a command.",
    )
    parser.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
    parser.add_argument("--version", action="version", version=f"hf-lm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, help_text) in COMMANDS.items():
        subparsers.add_parser(name, help=help_text, add_help=False)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if hasattr(sys.stdout, "reconfigure"):  # lone surrogates, a terminal without UTF-8: print escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # a command has one progress bar: its own
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; that of a notebook's kernel may not be installed here
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):  # read when torch is loaded
        os.environ["GOMP_SPINCOUNT"] = "10000"  # two runs on the same cores must not wait for each other spinning
    named = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    options = build_parser().parse_args(argv[: named + 1])
    module = importlib.import_module(f".{COMMANDS[options.command][0]}", __name__)
    parser = argparse.ArgumentParser(prog=f"hf-lm {options.command}", description=module.__doc__)
    module.add_arguments(parser)
    try:
        arguments = parser.parse_args(argv[named + 1 :])
        return module.run(arguments) or 0
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output is gone (hf-lm ... | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if options.debug:
            raise
        is_crash = not (is_invalid_input(error) or isinstance(error, Failure))
        about = f" (a crash: its traceback is {keep_traceback(error)})" if is_crash else ""
        print(f"hf-lm {options.command}: {one_line(error)}{about}", file=sys.stderr)
        return 2 if is_invalid_input(error) else 1
