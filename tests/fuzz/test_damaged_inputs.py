"""
Hundreds of damaged inputs of every kind: each ends in success or in one line that says what is wrong, within ten
seconds; nothing is written outside of the output folder, and nothing of it is executed.
"""

import csv
import gzip
import io
import json
import shutil
import struct
from pathlib import Path

import pytest
import yaml
from damage import damaged_bytes, damaged_json, damaged_values, text_of
from datasets import Dataset
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

USES = (
    ("score", "model", "the whale"), ("score", "model", "the whale"), ("generate", "model", "--max-new-tokens", "2"),
    ("evaluate", "model", "--data", "text.txt"), ("import", "model", "../written/imported"), ("doctor", "model"),
    ("export", "model", "../written/native"), ("card", "model", "--output", "../written/README.md"),
    ("push", "model", "owner/name", "--dry-run"), ("inspect", "model", "--text", "the sea", "--html", "../written/page"),
    ("train", "start.yaml"), ("chat", "model"),
)  # fmt: skip
ROWS = [{"text": f"the whale {number}", "n": number, "tags": ["a", None], "more": {"k": [0.5]}} for number in range(4)]
RECIPE = {
    "train_file": ["text.txt"], "tokenizer_kind": "byte", "vocab_size": 300, "block_size": 16, "learning_rate": 1e-3,
    "config_overrides": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "rope_parameters": {"rope_theta": 1e4}},
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "lr_scheduler_type": "constant", "optim": "adamw_torch",
    "weight_decay": 0.1, "warmup_steps": 0, "seed": 1, "report_to": "none", "validation_split_percentage": 0,
    "eval_strategy": "no", "save_strategy": "no", "logging_steps": 1, "streaming": False, "sample_prompts": ["a"],
    "sample_tokens": 2, "bf16": False, "muon_learning_rate": 0.01, "max_grad_norm": 1.0, "text_column_name": "text",
}  # fmt: skip


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


class Bench:
    """Where one damaged input is laid out, and what kinds of input share."""

    def __init__(self, machine, good_model: Path, llama: Path, draw, seen: set):
        self.machine, self.models, self.draw, self.seen = machine, (good_model, good_model, llama), draw, seen
        self.work = machine.new_work()
        write(self.work / "text.txt", b"the whale and the sea\n" * 20)
        start = {
            "model_name_or_path": "model",
            "train_file": "text.txt",
            "max_steps": 1,
            "output_dir": "../written/run",
        }
        write(self.work / "start.yaml", yaml.safe_dump(start | {"block_size": 16, "report_to": "none"}).encode())

    def model(self) -> Path:
        """A copy of one of the good models."""
        return Path(shutil.copytree(self.draw(st.sampled_from(self.models)), self.work / "model"))

    def run(self, *argv: str):
        """The command's outcome; no input is tried twice."""
        contents = b"".join(path.read_bytes() for path in sorted(self.work.rglob("*")) if path.is_file())
        assume((argv, contents) not in self.seen)
        self.seen.add((argv, contents))
        return self.machine(*argv, stdin="hello\n")

    def use_model(self):
        """Some command that reads the model."""
        return self.run(*self.draw(st.sampled_from(USES)))

    def use_data(self, name: str, content: bytes):
        """Some command that reads the data file."""
        write(self.work / name, content)
        uses = (("tokenizer", name, "--output", "../written/tokenizer"), ("evaluate", "model", "--data", name))
        argv = self.draw(st.sampled_from((uses[0], uses[0], uses[1])))
        if "model" in argv:
            self.model()
        columns = ((), (), ("--text-column-name", "text"), ("--text-column-name", "n"), ("--text-column-name", "no"))
        return self.run(*argv, *self.draw(st.sampled_from(columns)))


def configs(bench: Bench):
    path = bench.model() / "config.json"
    path.write_bytes(bench.draw(damaged_json(json.loads(path.read_text()))))
    return bench.use_model()


def tokenizer_files(bench: Bench):
    names = (
        "tokenizer.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    )
    path = bench.model() / bench.draw(st.sampled_from(names))
    content = path.read_bytes() if path.exists() else b"{}"
    is_json = path.suffix == ".json"
    path.write_bytes(bench.draw(damaged_json(json.loads(content)) if is_json else damaged_bytes(content)))
    return bench.use_model()


@st.composite
def damaged_safetensors(draw, content: bytes) -> bytes:
    """Header (JSON) or its length (the first 8 bytes) damaged, or the file as a whole."""
    size = int.from_bytes(content[:8], "little")
    kind = draw(st.sampled_from(("header", "header", "header", "length", "bytes")))
    if kind == "bytes":
        return draw(damaged_bytes(content))
    if kind == "length":
        sizes = (0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1)
        return struct.pack("<Q", draw(st.sampled_from(sizes))) + content[8:]
    header = draw(damaged_json(json.loads(content[8 : 8 + size])))
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def safetensors_headers(bench: Bench):
    path = bench.model() / "model.safetensors"
    path.write_bytes(bench.draw(damaged_safetensors(path.read_bytes())))
    return bench.use_model()


def shard_indexes(bench: Bench):
    """Outside of the folder lie good weights: whoever follows a path there succeeds, which is what must not happen."""
    folder = bench.model()
    weights = folder / "model.safetensors"
    header = weights.read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    names.pop("__metadata__", None)
    shutil.copy(weights, bench.work / "outside.safetensors")
    inside = "model-00001-of-00001.safetensors"
    weights.rename(folder / inside)
    (folder / "folder.safetensors").mkdir()
    index = {"metadata": {"total_size": 9000}, "weight_map": dict.fromkeys(names, inside)}
    places = (
        "../outside.safetensors", str(bench.work / "outside.safetensors"), "..\\outside.safetensors", "./" + inside,
        "no.safetensors", "folder.safetensors", "../model/" + inside, "tokenizer.json", "pytorch_model.bin", "\0", "~/x",
    )  # fmt: skip
    path = folder / "model.safetensors.index.json"
    if bench.draw(st.booleans()):
        some = bench.draw(st.sampled_from(sorted(names)))
        index["weight_map"][some] = place = bench.draw(st.sampled_from(places))
        path.write_text(json.dumps(index))
        outcome = bench.use_model()
        assert outcome.code != 0 or outcome.argv[0] == "card" or place == "./" + inside, place
        return outcome
    path.write_bytes(bench.draw(damaged_json(index)))
    return bench.use_model()


def recipes(bench: Bench):
    """The steps and the output folder are given on the command line, so that no mutation trains for hours."""
    content = yaml.safe_dump(RECIPE).encode()
    kind = bench.draw(st.sampled_from(("values", "values", "values", "bytes", "yaml")))
    if kind == "values":
        content = text_of(bench.draw(damaged_values(RECIPE))).encode("utf-8", "surrogatepass")  # JSON is YAML
    elif kind == "bytes":
        content = bench.draw(damaged_bytes(content))
    else:
        key = bench.draw(st.sampled_from(sorted(RECIPE))).encode()
        content = content.replace(
            b"\n" + key + b":", b"\n" + key + b": " + bench.draw(st.sampled_from(YAML)) + b"\n#", 1
        )
    write(bench.work / "recipe.yaml", content)
    return bench.run("train", "recipe.yaml", "--max_steps", "1", "--output_dir", "../written/run")


YAML = (
    b"!!python/object/apply:os.system ['touch EXECUTED']", b"!!python/name:os.system", b"!!python/object:os.x {}", b"*nothing",
    b"&a [*a]", b"[a, b", b"!!binary aGk=", b"2020-01-01", b"? x", b"!unknown x", b"| \n  x", b"\t", b"%", b"@", b"!!set {a}",
    b"&a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]", b"{a: 1, a: 2}", b".nan", b"1e999",
    b"--overwrite", b"'--output_dir=../outside'", b"['--resume']",
)  # fmt: skip


def json_rows(bench: Bench):
    rows = [text_of(row) for row in ROWS]
    if bench.draw(st.booleans()):
        number = bench.draw(st.integers(0, len(rows) - 1))
        rows[number] = bench.draw(damaged_json(ROWS[number])).decode("utf-8", "surrogateescape")
    content = "\n".join(rows).encode("utf-8", "surrogateescape")
    if bench.draw(st.booleans()):
        content = bench.draw(damaged_bytes(content))
    return bench.use_data(bench.draw(st.sampled_from(("rows.jsonl", "rows.jsonl", "rows.json"))), content)


def tables(bench: Bench):
    """CSV: quotes left open, rows too short and too long, wrong types."""
    stream = io.StringIO()
    cells = st.sampled_from(
        ("the sea", "", '"', '""', 'a "b" c', "a,b", "x\ny", "\0", "NA", "1e5", "=1+1", "é鲸", "\r", "9" * 400)
    )
    rows = bench.draw(st.lists(st.lists(cells, max_size=4), min_size=1, max_size=5))
    csv.writer(stream, quoting=bench.draw(st.sampled_from((0, 1)))).writerows([["text", "n"], *rows])
    content = stream.getvalue().encode()
    return bench.use_data("rows.csv", bench.draw(damaged_bytes(content)) if bench.draw(st.booleans()) else content)


def parquet(bench: Bench):
    rows = [dict(row) for row in ROWS]
    if bench.draw(st.booleans()):
        column = bench.draw(
            st.sampled_from(([1, 2], [None, None], [["a"], []], [{"a": 1}, None], [b"\xff", b"x"], ["a", "\0"]))
        )
        rows = {"text": column, "n": ["one", ""]}
    stream = io.BytesIO()
    (Dataset.from_dict(rows) if isinstance(rows, dict) else Dataset.from_list(rows)).to_parquet(stream)
    return bench.use_data("rows.parquet", bench.draw(damaged_bytes(stream.getvalue())))


def texts(bench: Bench):
    good = b"the whale \xe9\xb2\xb8\r\n" * 3
    content = bench.draw(st.one_of(damaged_bytes(good), st.binary(max_size=40), st.just(gzip.compress(good)[:-9])))
    return bench.use_data(bench.draw(st.sampled_from(("text.md", "some.txt"))), content)


# kind of input: how many the slow suite tries
KINDS = {
    configs: 200, tokenizer_files: 140, safetensors_headers: 100, shard_indexes: 70, recipes: 80, json_rows: 90, tables: 60,
    parquet: 40, texts: 20,
}  # fmt: skip
SAMPLE = 5  # of each in the default suite


def test_there_are_five_hundred_different_inputs():
    assert sum(KINDS.values()) >= 500


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        *(pytest.param(kind, SAMPLE, id=f"{kind.__name__}-sample") for kind in KINDS),
        *(pytest.param(kind, count, id=kind.__name__, marks=pytest.mark.slow) for kind, count in KINDS.items()),
    ],
)
def test_damaged_input_is_used_or_refused_in_one_line(kind, count, machine, good_model, llama):
    seen = set()

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def run(data):
        kind(Bench(machine, good_model, llama, data.draw, seen)).check()

    run()
    assert len(seen) >= count
