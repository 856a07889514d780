"""Write the model card (README.md) of a model folder, from the measurements in it: hf-lm card MODEL."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model folder")
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="of the card's words (default en)")
    parser.add_argument(
        "--output", metavar="FILE", help="default MODEL/README.md; an existing folder receives <model>/README.md"
    )
    parser.add_argument("--name", metavar="OWNER/NAME", help="of the model on the Hub; default: the folder's name")
    parser.add_argument(
        "--license", metavar="ID", help="of the weights, such as apache-2.0; default: as stated so far"
    )
    parser.add_argument(
        "--text-language", metavar="ID", help="of the training text, such as en; default: as stated so far"
    )


def run(arguments: argparse.Namespace) -> int:
    from ..errors import InputError
    from ..hub.card import write_card
    from ..interop.convert import readable

    if len(arguments.models) > 1 and arguments.output and not Path(arguments.output).is_dir():
        raise InputError(f"--output: {arguments.output} must be an existing folder for the cards of several models.")
    for model in arguments.models:
        with readable(model):
            path = write_card(
                model,
                arguments.language,
                arguments.output,
                name=arguments.name,
                license=arguments.license,
                text_language=arguments.text_language,
            )
        print(path)
    return 0
