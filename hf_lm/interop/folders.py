"""What a model folder may hold, checked by reading it; nothing here runs code of the folder."""

import json
import math
import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import InputError
from ..files import as_table, read_json

MAX_HEADER = 100_000_000  # bytes of a safetensors header, safetensors' own limit


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


def check_weight_files(folder: Path) -> set[str]:
    """
    The names of the tensors in a model folder.

    Raises:
        InputError: the index of a sharded checkpoint is no index, or names a file outside its folder; a weight file is
            missing, no safetensors file at all (a git-lfs pointer, a web page), or cut short.
    """
    files = set(folder.glob("*.safetensors"))
    for path in sorted(folder.glob("*.safetensors.index.json")):
        try:
            names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path}: no index of a sharded checkpoint, it needs a weight_map of tensors to files ({error!r})."
            ) from error
        for name in names:
            if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
                raise InputError(f"{path}: weight_map names {name!r}; only safetensors files beside it are allowed.")
        files |= {folder / name for name in names}
    return {name for file in sorted(files) for name in tensor_names(file)}


def tensor_names(file: Path) -> list[str]:
    """Those of one safetensors file; raises as `check_weight_files`."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise InputError(f"{file}: listed in the index of the checkpoint, but there is no such file.")
    with open(file, "rb") as stream:
        head = stream.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{file}: a git-lfs pointer instead of weights; fetch the file itself (git lfs pull).")
    if head.lstrip()[:1] == b"<":
        raise InputError(f"{file}: a web page (HTML) instead of weights; download the file itself.")
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        size = file.stat().st_size
        raise InputError(f"{file}: {size} bytes that are no complete safetensors file ({error}).") from error
