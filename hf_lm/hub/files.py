"""What may and may not lie in a model folder, found by reading it; nothing here runs code of the folder."""

import os
import re
from pathlib import Path

from ..interop.folders import is_outside

# Suffixes of files that Python may unpickle: reading them can run code. (`*.bin` and `*.pt` are pickles by custom.)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy")
# Of a training run, not of the model: never pushed. Folders first.
NOT_THE_MODEL = re.compile(
    r"(^|/)([^/]*checkpoint-\d+|runs|logs|wandb|__pycache__|\.[^/]*)(/|$)|(^|/)(events\.out\.|crash(-\d+)?\.txt$)|\.tmp$|~$"
)
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
HEADS = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering")
# Shapes of access tokens and keys (Hugging Face, OpenAI and alike, GitHub, AWS, Google, Slack, private keys).
SECRETS = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}\b|\bapi_org_[A-Za-z0-9]{30,}\b|\bsk-[A-Za-z0-9_-]{32,}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b"
    rb"|\bgithub_pat_\w{50,}\b|\bAKIA[0-9A-Z]{16}\b|\bAIza[0-9A-Za-z_-]{35}\b|\bxox[abprs]-[0-9A-Za-z-]{10,}\b"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


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
