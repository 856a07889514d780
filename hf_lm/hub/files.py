"""What may and may not lie in a model folder, found by reading it; nothing here runs code of the folder."""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import InputError

# Suffixes of files that Python may unpickle: reading them can run code. (`*.bin` and `*.pt` are pickles by custom.)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy")
# Of a training run, not of the model: never pushed. Folders first.
NOT_THE_MODEL = re.compile(
    r"(^|/)([^/]*checkpoint-\d+|runs|logs|wandb|__pycache__|\.[^/]*)(/|$)|(^|/)events\.out\.|\.tmp$|~$"
)
MAX_HEADER = 100_000_000  # bytes of a safetensors header, the library's own limit
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
HEADS = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering")
# Shapes of access tokens and keys (Hugging Face, OpenAI and alike, GitHub, AWS, Google, Slack, private keys).
SECRETS = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}\b|\bapi_org_[A-Za-z0-9]{30,}\b|\bsk-[A-Za-z0-9_-]{32,}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b"
    rb"|\bgithub_pat_\w{50,}\b|\bAKIA[0-9A-Z]{16}\b|\bAIza[0-9A-Za-z_-]{35}\b|\bxox[abprs]-[0-9A-Za-z-]{10,}\b"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def read_json(path: Path) -> dict:
    """The object in a JSON file; `{}` if it is missing or none (loading the model says what is wrong with it)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return as_table(content)


@contextmanager
def library_is_silent() -> Iterator[None]:
    """The library warns of what is then refused: one line about a mistake is enough."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def is_missing_folder(name: str, *others: str) -> bool:
    """
    Whether a model's name can only be a path on this machine, and nothing is there: asking the Hub would take a minute of
    retries and end in an error about something else.

    Args:
        others: paths on this machine, whose first folder is not an owner on the Hub either.
    """
    if os.path.exists(name):
        return False
    first = name.split("/")[0]
    owned = "/" in name and (
        os.path.isdir(first) or first in {os.path.normpath(other).split("/")[0] for other in others}
    )
    return owned or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def as_table(value) -> dict:
    """The value where it is an object; else an empty one."""
    return value if isinstance(value, dict) else {}


def check_sizes(folder: Path) -> None:
    """
    Raises:
        InputError: config.json asks for many more layers than the weights have tensors, or for an embedding of more
            numbers than they have bits: to build such a model takes hours, or all memory.
    """
    config, tensors, bits = read_json(folder / "config.json"), 0, 0
    for file in filter(Path.is_file, folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            tensors += stream.read(min(size, MAX_HEADER)).count(b'"data_offsets"')
        bits += 8 * file.stat().st_size
    layers, embedding = max(tensors, 1000), max(bits, 10**8)  # what is built in a moment is compared when it is loaded
    for names, most in ((["num_hidden_layers"], layers), (["n_layer"], layers), (["vocab_size", "hidden_size"], embedding)):  # fmt: skip
        sizes = [config.get(name) for name in names]
        if bits and all(isinstance(size, int) for size in sizes) and math.prod(sizes) > most:
            given = " and ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
            raise InputError(
                f"{folder / 'config.json'}: {given} do not fit the weights: {tensors} tensors, {bits // 8} bytes."
            )


def is_outside(name) -> bool:
    """Whether a file name, read on any system, leads out of the folder that names it."""
    paths = PurePosixPath(str(name)), PureWindowsPath(str(name))
    return any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)


def outside_paths(folder: Path) -> list[str]:
    """
    `file: value` of each path in configs, shard indexes and adapter configs that is absolute or has a `..`, but for the
    base model of an adapter that was trained on this machine.
    """
    named = []
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"):
        for value in as_table(read_json(folder / name).get("auto_map")).values():
            references = value if isinstance(value, list) else [value]
            named += [(name, reference.split("--")[-1]) for reference in references if isinstance(reference, str)]
    for path in sorted(folder.glob("*.index.json")):
        weight_map = as_table(read_json(path).get("weight_map"))
        named += [(path.name, value) for value in sorted(set(map(str, weight_map.values())))]
    adapter = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if adapter and not (Path(str(adapter)) / "config.json").is_file():
        named.append(("adapter_config.json, where no base model is", adapter))
    return [f"{name}: {value}" for name, value in named if is_outside(value)]


def missing_code(folder: Path, auto_map: dict) -> list[str]:
    """What `trust_remote_code=True` would look for in vain: Auto classes without an entry, files that are not there."""
    from transformers.dynamic_module_utils import get_relative_imports

    missing = [f"auto_map.{name}" for name in AUTO_CLASSES + HEADS if name not in auto_map]
    wanted = [
        f"{str(value).split('--')[-1].split('.')[0]}.py" for value in auto_map.values() if "--" not in str(value)
    ]
    seen = set()
    while wanted:
        name = wanted.pop()
        if name in seen or is_outside(name):
            continue
        seen.add(name)
        if (folder / name).is_file():
            wanted += [f"{module}.py" for module in get_relative_imports(folder / name)]
        else:
            missing.append(name)
    return missing


def model_files(folder: Path) -> tuple[list[str], list[str]]:
    """
    The files that make up the model and those that stay at home: pickles, checkpoints, logs, hidden and stray files.

    Returns:
        Two sorted lists of paths relative to `folder`, with `/`.
    """
    kept, left_out = [], []
    for directory, folders, names in os.walk(folder):
        relative = Path(directory).relative_to(folder)
        for name in sorted(folders):
            if NOT_THE_MODEL.search((relative / name).as_posix()):
                folders.remove(name)
                left_out.append((relative / name).as_posix() + "/")
        for name in names:
            path = (relative / name).as_posix()
            is_link_out = not (folder / path).resolve().is_file()
            skipped = NOT_THE_MODEL.search(path) or name == "trainer_state.json" or name.endswith(PICKLES)
            (left_out if skipped or is_link_out else kept).append(path)
    return sorted(kept), sorted(left_out)


def pickles(folder: Path) -> list[str]:
    """Pickles that count as the model's: not those inside of a run's checkpoints and logs."""
    return [path for path in model_files(folder)[1] if path.endswith(PICKLES) and not NOT_THE_MODEL.search(path)]


def secrets_in(path: Path, token: str | None = None) -> list[str]:
    """What in a file looks like an access token or is `token`, cut short so that it can be shown. Weights are not read."""
    if path.suffix in (".safetensors", ".gguf", ".png"):
        return []
    content = path.read_bytes()
    found = [match.group().decode()[:6] + "..." for match in SECRETS.finditer(content)]
    if token and token.encode() in content:
        found.append("your token")
    return found
