"""Write api.md from the docstrings: python recipes/guides/api_reference.py"""

import importlib
import inspect
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

from transformers import TrainingArguments

import hf_lm
from hf_lm.cli import COMMANDS

# What people call; the rest of the package may change.
MODULES = (
    "loading", "tokenization", "data.documents", "data.packing", "data.examples", "app.run", "training.trainer",
    "training.optimizers", "interop.adapters", "tasks.base", "evaluation.text", "evaluation.sentences",
    "evaluation.quality", "evaluation.probe", "evaluation.metrics.bits_per_byte", "evaluation.metrics.perplexity",
    "evaluation.metrics.classification", "evaluation.translation", "generation.conversation", "reports.explain",
    "planning.plan", "planning.forecast", "reports.report",
    "interop.convert", "interop.gguf", "hub.card", "hub.doctor", "hub.push",
)  # fmt: skip


def entry(name: str, item) -> str:
    """One class or function: name, signature, docstring as written."""
    try:
        signature = re.sub(r"<function (\w+) at 0x\w+>", r"\1", str(inspect.signature(item)))
    except ValueError:
        signature = ""
    text = inspect.getdoc(item) or ""
    return f"### `{name}`\n\n```text\n{name.split('.')[-1]}{signature}\n\n{text}\n```\n"


def public(module) -> list[tuple[str, object]]:
    """The documented classes and functions that are defined in a module, in its order."""
    return [
        (name, item)
        for name, item in vars(module).items()
        if not name.startswith("_")
        and getattr(item, "__module__", None) == module.__name__
        and (inspect.isclass(item) or inspect.isfunction(item))
        and inspect.getdoc(item)
    ]


def keys(of_group) -> str:
    """The keys that fields of dataclasses are in a recipe, as a table."""
    inherited = {field.name for field in fields(TrainingArguments)}
    rows = ["| key | default | what |", "|---|---|---|"]
    for field in of_group:
        default = "" if field.default in (MISSING, None) else f"`{field.default}`".replace("\n", "\\n")
        changed = " (upstream's key)" if field.name in inherited else ""
        rows.append(f"| `{field.name}` | {default} | {field.metadata['help'].replace('|', '/')}{changed} |")
    return "\n".join(rows)


def server_fields() -> str:
    """What `hf-lm serve` does with each field of OpenAI's protocol, as a table."""
    from hf_lm.serving.protocol import LABELS, REFUSED, ChatRequest, CompletionRequest

    rows = ["| field | chat completions | completions |", "|---|---|---|"]
    for field in sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, *REFUSED, *LABELS}):
        reason, neutral = REFUSED.get(field, ("", ()))
        accepted = "".join(f"; `{json.dumps(value)}` is accepted" for value in neutral)
        other = "a label, changes no answer" if field in LABELS else f"refused: {reason}{accepted}" if reason else ""
        verdicts = ("honoured" if field in kind.model_fields else other for kind in (ChatRequest, CompletionRequest))
        rows.append(f"| `{field}` | {' | '.join(verdicts)} |")
    return "\n".join(rows)


def reference() -> str:
    """The whole page."""
    from hf_lm.data.arguments import DataArguments
    from hf_lm.tasks import fields_of, own_keys
    from hf_lm.training.keys import ModelArguments, TrainingKeys
    from hf_lm.training.verdicts import verdict_table

    parts = [
        "# Reference\n\nMade by `python recipes/guides/api_reference.py` from the docstrings; do not edit.\n",
        "## Commands\n\n| `hf-lm` | what it does |\n|---|---|",
        *(f"| `{name}` | {what} |" for name, (_, what) in COMMANDS.items()),
        "\n## Keys of a recipe\n\nAnd those of `transformers.TrainingArguments` that the next section lists.\n",
        *(f"{keys(fields(group))}\n" for group in (ModelArguments, DataArguments, TrainingKeys)),
        *(f"Of task {' and '.join(tasks)}:\n\n{keys(fields_of(group))}\n" for group, tasks in own_keys().items()),
        f"## Arguments of transformers in a recipe\n\nAll those of `transformers.TrainingArguments`:\n\n{verdict_table()}\n",
        f"## Fields of the server\n\nA field that is not listed is refused.\n\n{server_fields()}\n",
        "## The model\n",
        *(entry(f"hf_lm.{name}", getattr(hf_lm, name)) for name in hf_lm.__all__ if name[0] != "_"),
    ]
    for name in MODULES:
        module = importlib.import_module(f"hf_lm.{name}")
        about = (inspect.getdoc(module) or "").strip()
        parts += [f"## `hf_lm.{name}`\n\n{about}\n", *(entry(item_name, item) for item_name, item in public(module))]
    return "\n".join(line.rstrip() for line in "\n".join(parts).splitlines()) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(reference(), encoding="utf-8")
