"""
Render the tables of the benchmark pages and of the log from the recorded runs:

    python recipes/benchmarks/render.py [--check]

A page holds, in comments, what its tables show; the text between such a comment and the next `<!-- end -->` is
generated.

    <!-- table
    data: training_step.amx                   # files in records/ beside the page, without .jsonl; a pattern or a list
    where: {compile: false}                   # keep these records; a list means any of its values
    summarize: defaults.summarize             # function of a script that makes rows of records
    each: sides                               # one row per side of a comparison, with `side`, `value` and `ratio`
    columns:
      shape: "{shape}"                        # format string over the record's case, numbers and other fields
      speed: {show: "{ratio[hf_lm][tokens_per_second][median]:.2f}", goal: ">= 1.4"}   # bold where the goal is met
    -->

`<!-- goals -->` makes a row per goal with the best value of each machine and how many cases meet it, `<!-- data -->` a
row per data file, and `<!-- entries -->` the index of the log. A later record of the same case and seed replaces an
earlier one in the tables.
"""

import functools
import importlib
import json
import re
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

HERE = Path(__file__).parent
RECIPES = HERE.parent
BLOCK = re.compile(r"<!-- (table|goals|data|entries)\n?(.*?)-->\n.*?<!-- end -->", re.S)
COMPARE = {">=": lambda value, bound: value >= bound, "<=": lambda value, bound: value <= bound}


class Missing(Exception):
    """A field that a record does not have."""


class Formatter(string.Formatter):
    """Format strings over a record; a field that is missing or None makes the cell empty."""

    def get_field(self, field_name, args, kwargs):
        try:
            value = super().get_field(field_name, args, kwargs)
        except (KeyError, TypeError) as error:
            raise Missing(field_name) from error
        if value[0] is None:
            raise Missing(field_name)
        return value

    def format_field(self, value, format_spec):
        if isinstance(value, list):  # repeated measurements
            return ", ".join(self.format_field(item, format_spec) for item in value)
        if isinstance(value, dict):  # a range
            return " to ".join(self.format_field(value[name], format_spec) for name in ("lowest", "highest"))
        if isinstance(value, bool):
            return "yes" if value else "no"
        return super().format_field(value, format_spec) if isinstance(value, int | float) else str(value)


def pages() -> list[Path]:
    """All pages with generated tables."""
    return [*sorted(HERE.glob("*.md")), RECIPES / "LOG.md", *sorted((RECIPES / "log").glob("*.md"))]


def read(folder: Path, names: str | list[str]) -> list[dict]:
    """The records of data files, the last one of each case and seed, in the order of the files."""
    records = {}
    for name in [names] if isinstance(names, str) else names:
        files = sorted(folder.glob(f"{name}.jsonl"))
        if not files:
            raise SystemExit(f"no such data: {folder / name}.jsonl")
        for file in files:
            for line in file.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                key = [record["machine"], record["case"], record["seed"]]
                if "entry" in record:  # of the log, which is not measured again
                    key = [len(records)]
                records[json.dumps(key, sort_keys=True)] = record
    return list(records.values())


@functools.cache
def labels() -> dict[str, str]:
    """How tables call the machines."""
    return {record["machine"]: record["label"] for record in read_machines()}


def read_machines() -> list[dict]:
    """The machines, each with the first and last date of its records."""
    lines = (HERE / "records" / "machines.jsonl").read_text(encoding="utf-8").splitlines()
    machines = [json.loads(line) for line in lines]
    dates = {}
    for file in (HERE / "records").glob("*.*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            dates.setdefault(record["machine"], []).append(record["date"])
    return [
        {**machine, "first": min(dates[machine["machine"]]), "last": max(dates[machine["machine"]])}
        for machine in machines
    ]


def fields_of(record: dict) -> dict:
    """A record as one mapping: its own fields, those of its case and its numbers."""
    fields = {**record, **record.get("case", {}), **record.get("numbers", {})}
    if "machine" in record:
        fields["machine"] = labels().get(record["machine"], record["machine"])
        fields["record"] = "yes" if record.get("raw") else "no"
        fields["settings_of_run"] = fields.get("state") or fields.get("method")
    return fields


def rows_of(spec: dict, folder: Path) -> Iterator[dict]:
    """The rows of a table, as mappings for the format strings."""
    records = read_machines() if spec["data"] == "machines" else read(folder, spec["data"])
    if "summarize" in spec:
        module, _, function = spec["summarize"].partition(".")
        records = getattr(importlib.import_module(module), function)(records)
    for record in records:
        fields = fields_of(record)
        wanted = spec.get("where", {}).items()
        if not all(fields.get(name) in (value if isinstance(value, list) else [value]) for name, value in wanted):
            continue
        if spec.get("each") != "sides":
            yield fields
            continue
        for side, value in record["numbers"]["sides"].items():
            yield {**fields, "side": side, "value": value, "ratio": record["numbers"]["ratio"].get(side)}


def show(text: str, fields: dict) -> str:
    """One cell; empty if the record lacks a field."""
    try:
        return Formatter().format(text, **fields)
    except Missing:
        return ""


def meets(text: str, goal: str) -> bool:
    """Whether the number that a cell begins with meets a goal such as `>= 1.4`."""
    sign, bound = goal.split()
    number = re.match(r"[-+]?[\d,]*\.?\d+%?", text)[0].replace(",", "")
    value = float(number.rstrip("%")) / (100 if number.endswith("%") else 1)
    return COMPARE[sign](value, float(bound))


def table(spec: dict, folder: Path) -> str:
    """
    A Markdown table.

    :raises SystemExit: it has no rows, or a column in which all cells are empty.
    """
    columns = {
        head: {"show": column} if isinstance(column, str) else column for head, column in spec["columns"].items()
    }
    lines, filled = [], set()
    for fields in rows_of(spec, folder):
        cells = []
        for head, column in columns.items():
            cell = show(column["show"], fields)
            filled |= {head} if cell else set()
            cells.append(f"**{cell}**" if cell and "goal" in column and meets(cell, column["goal"]) else cell)
        if any(cells):
            lines.append("| " + " | ".join(cells) + " |")
    if empty := [head for head in columns if head not in filled]:
        raise SystemExit(f"{spec['data']}: no record fills the columns {empty}")
    if "sort" in spec:
        lines.sort(reverse=spec["sort"] == "descending")
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *lines])


def goals(specs: list[dict], folder: Path) -> str:
    """A table of the goals: per machine the best value, and how many cases meet the goal."""
    machines = labels()
    lines = []
    for spec in specs:
        found: dict[str, list[tuple[str, bool]]] = {}
        for fields in rows_of(spec, folder):
            if text := show(spec["show"], fields):
                found.setdefault(fields["machine"], []).append((text, meets(text, spec["goal"])))
        best = max if spec["goal"].startswith(">=") else min
        cells = []
        for label in [label for label in machines.values() if label != "unrecorded"]:
            values = found.get(label, [])
            if not values:
                cells.append("not run")
                continue
            text = best((text for text, _ in values), key=lambda text: float(text.strip("%+").replace(",", "")))
            met = sum(is_met for _, is_met in values)
            cells.append(f"{text}, {'met' if met == len(values) else f'met in {met} of {len(values)}'}")
        goal = spec["goal"].replace(">=", "≥").replace("<=", "≤")
        lines.append(f"| [{spec['name']}]({spec['page']}) | {goal} | " + " | ".join(cells) + " |")
    heads = [label for label in machines.values() if label != "unrecorded"]
    return "\n".join(["| question | goal | " + " | ".join(heads) + " |", "|" + "---|" * (2 + len(heads)), *lines])


def data_table(patterns: list[str], folder: Path) -> str:
    """A row per data file: records, how many of them are raw measurements, first and last date, last commit."""
    lines = []
    for file in sorted(file for pattern in patterns for file in folder.glob(f"{pattern}.jsonl")):
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        raw, dates = sum(record["raw"] for record in records), sorted({record["date"] for record in records})
        span = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        link = f"[{file.name}]({folder.name}/{file.name})"
        lines.append(f"| {link} | {len(records)} | {raw} | {span} | {records[-1]['commit']} |")
    return "\n".join(["| file | records | raw | dates | last commit |", "|---|---|---|---|---|", *lines])


ENTRY = re.compile(
    r"^## (?P<idea>[^\n]+): (?P<verdict>[^:\n]+)\n\n(?P<date>\d{4}-\d\d-\d\d)\. Effect: (?P<effect>.+?)\n\n",
    re.M | re.S,
)


def read_entries() -> list[dict]:
    """The log's entries, the newest first: date, area, idea, effect, verdict, and a link."""
    entries = []
    for path in sorted((RECIPES / "log").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        area = re.match(r"# (.+)", text)[1]
        for found in ENTRY.finditer(text):
            heading = f"{found['idea']}: {found['verdict']}"
            anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            effect = " ".join(found["effect"].split()).rstrip(".")
            entries.append({**found.groupdict(), "effect": effect, "area": area, "link": f"log/{path.name}#{anchor}"})
    return sorted(entries, key=lambda entry: entry["date"], reverse=True)


def entries_table() -> str:
    """The index of the log."""
    lines = [
        "| {date} | {area} | [{idea}]({link}) | {effect} | {verdict} |".format(**entry) for entry in read_entries()
    ]
    return "\n".join(["| date | area | idea | effect | verdict |", "|---|---|---|---|---|", *lines])


def render(path: Path) -> str:
    """A page with its tables as the records have them."""

    def replace(found: re.Match) -> str:
        kind, text = found.groups()
        spec, folder = yaml.safe_load(text), path.parent / "records"
        makers = {"table": table, "goals": goals, "data": data_table}
        made = makers[kind](spec, folder) if kind in makers else entries_table()
        opening = found[0][: found[0].index("-->") + 3]
        return f"{opening}\n\n{made}\n\n<!-- end -->"

    return BLOCK.sub(replace, path.read_text(encoding="utf-8"))


def main(words: list[str]) -> int:
    """Render all pages; with `--check` only name those that are not current, and exit with 1 if there are any."""
    sys.path.insert(0, str(HERE))
    stale = [path for path in pages() if render(path) != path.read_text(encoding="utf-8")]
    for path in stale:
        print(path.relative_to(RECIPES))
        if words != ["--check"]:
            path.write_text(render(path), encoding="utf-8")
    return int(words == ["--check"] and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
