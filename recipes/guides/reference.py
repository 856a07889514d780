"""Write the reference from the code: the tables of reference.md, a page of all commands and a page for each module."""

import argparse
import importlib
import json
from dataclasses import MISSING, fields

from transformers import TrainingArguments

from hf_lm.cli import COMMANDS
from hf_lm.data.arguments import DataArguments
from hf_lm.tasks import fields_of, own_keys
from hf_lm.training.keys import ModelArguments, TrainingKeys
from hf_lm.training.verdicts import verdict_table

# What people call; the rest of the package may change.
MODULES = (
    "configuration_hf_lm", "modeling_hf_lm", "loading", "tokenization", "data.documents", "data.packing",
    "data.examples", "app.run", "training.trainer", "training.optimizers", "tasks.base", "tasks.recipe",
    "evaluation.text", "evaluation.sentences", "evaluation.quality", "evaluation.probe", "evaluation.translation",
    "evaluation.metrics.bits_per_byte", "evaluation.metrics.perplexity", "evaluation.metrics.classification",
    "generation.conversation", "planning.plan", "planning.forecast", "reports.explain", "reports.report",
    "interop.adapters", "interop.convert", "interop.gguf", "hub.card", "hub.doctor", "hub.push",
)  # fmt: skip


def key_table(of_group) -> str:
    """The keys that fields of dataclasses are in a recipe, as a table."""
    inherited = {field.name for field in fields(TrainingArguments)}
    rows = ["| key | default | what |", "|---|---|---|"]
    for field in of_group:
        default = "" if field.default in (MISSING, None) else f"`{field.default}`".replace("\n", "\\n")
        changed = " (a key of transformers)" if field.name in inherited else ""
        rows.append(f"| `{field.name}` | {default} | {field.metadata['help'].replace('|', '/')}{changed} |")
    return "\n".join(rows)


def recipe_keys() -> str:
    """The keys that every recipe has, and those of each task, as tables."""
    of_all = [key_table(fields(group)) for group in (ModelArguments, DataArguments, TrainingKeys)]
    of_tasks = [
        f"Of task {' and '.join(tasks)}:\n\n{key_table(fields_of(group))}" for group, tasks in own_keys().items()
    ]
    return "\n\n".join(of_all + of_tasks)


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


def command_table() -> str:
    """What each command does, as a table."""
    rows = (f"| [`{name}`](../reference/commands.md#{name}) | {what} |" for name, (_, what) in COMMANDS.items())
    return "\n".join(["| `hf-lm` | what it does |", "|---|---|", *rows])


def module_list() -> str:
    """The pages of the modules, as a list."""
    return "\n".join(f"- [`hf_lm.{name}`](../reference/{name}.md)" for name in MODULES)


# Comment in reference.md: what takes its place on the site.
SECTIONS = {
    "commands": command_table,
    "recipe keys": recipe_keys,
    "training arguments": verdict_table,
    "server fields": server_fields,
    "modules": module_list,
}


def commands_page() -> str:
    """The help of each command. The keys of `hf-lm train` are left out: the tables have them."""
    parts = ["# Commands\n"]
    for name, (module_name, what) in COMMANDS.items():
        module = importlib.import_module(f"hf_lm.cli.{module_name}")
        parser = argparse.ArgumentParser(
            prog=f"hf-lm {name}",
            description=module.__doc__,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
        )
        module.add_arguments(parser)
        text = parser.format_help().partition("\nkeys, in CONFIG.yaml")[0].strip()
        parts.append(f"## {name}\n\n{what[0].upper()}{what[1:]}.\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def pages() -> dict[str, str]:
    """The generated pages: name and Markdown, in which `:::` asks mkdocstrings for the docstrings of a module."""
    modules = {f"{name}.md": f"# `hf_lm.{name}`\n\n::: hf_lm.{name}\n" for name in MODULES}
    return {"commands.md": commands_page(), **modules}
