"""Check a model folder, ours or not, against what users trip over: hf-lm doctor PATH. Exits with 1 if a check fails."""

import argparse
import json
from dataclasses import asdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="PATH", help="folder of a causal language model")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python files in the folder, if it needs them"
    )


def run(arguments: argparse.Namespace) -> int:
    import hf_lm

    hf_lm.register_auto_classes()
    from ..hub.doctor import examine

    findings = examine(arguments.model, arguments.trust_remote_code)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        print(*findings, sep="\n")
    return int(any(finding.is_failure for finding in findings))
