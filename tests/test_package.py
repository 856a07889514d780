"""The package as a whole: which way imports go, what importing it costs and does."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_lm"

# The rooms from the ground up, as CONTRIBUTING.md draws them. A room may import from rooms below its own.
PICTURE = re.search(
    r"```text\n(.*?)```", (PACKAGE.parent / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S
)[1]
LEVELS = [re.split(r" {2,}", line)[0].split(", ") for line in reversed(PICTURE.splitlines())]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
HUB_FILES = ("configuration_hf_lm", "functional_hf_lm", "modeling_hf_lm")


def imports_of(path: Path) -> set[str]:
    """The rooms of hf_lm that a file imports at any depth, inside functions too."""
    package = ["hf_lm", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {
            part[1] if len(part) > 1 and part[1] in LEVEL else "__init__"
            for part in parts
            if part[0] == "hf_lm" and len(part) > 1
        }
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_a_level():
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} == set(LEVEL)


def test_every_folder_of_modules_says_what_it_is():
    """Tools that read a package without running it skip folders that have no __init__.py."""
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path):
    room = room_of(path)
    others = imports_of(path) - {room}
    not_below = {name for name in others if LEVEL[name] >= LEVEL[room]}
    assert not not_below, f"{room} imports from rooms that are not below it: {not_below}"


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_need_only_torch_transformers_and_siblings(name: str):
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module in HUB_FILES, node.module
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for imported in names:
                assert imported.split(".")[0] in {*sys.stdlib_module_names, "torch", "transformers", "huggingface_hub"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "tasks").glob("*.py")), ids=lambda path: path.name)
def test_tasks_hold_the_recipe_and_hand_on_everything_else(path: Path):
    """No method of a task leaves an attribute for another one."""
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef) and function.name not in ("__init__", "__post_init__"):
            stored = {
                ast.unparse(node) for node in ast.walk(function) if isinstance(getattr(node, "ctx", None), ast.Store)
            }
            assert not {name for name in stored if name.startswith("self.")}, f"{path.name}: {function.name}"


def test_hub_files_are_short_enough_to_read_before_they_are_trusted():
    assert sum(len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in HUB_FILES) <= 1250


def test_text_files_name_their_encoding():
    """Without one, Windows and some locales read and write another than UTF-8."""
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("recipes/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
                continue
            method = node.func.attr if isinstance(node.func, ast.Attribute) else None
            is_open = isinstance(node.func, ast.Name) and node.func.id == "open"
            is_binary = len(node.args) > 1 and "b" in str(getattr(node.args[1], "value", ""))
            assert method not in ("read_text", "write_text") and (is_binary or not is_open), (path, node.lineno)


def run_python(code: str, *arguments: str) -> str:
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return result.stdout


def test_importing_the_package_registers_all_auto_classes_and_public_names_load_on_first_use():
    code = """
import hf_lm, transformers
config = transformers.AutoConfig.for_model("hf_lm", vocab_size=8, hidden_size=8, num_attention_heads=1)
for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
             "AutoModelForTokenClassification", "AutoModelForQuestionAnswering"):
    print(type(getattr(transformers, name).from_config(config)).__name__)
print(all(getattr(hf_lm, name) for name in hf_lm.__all__))
"""
    assert run_python(code).split() == [
        "HfLmModel",
        "HfLmForCausalLM",
        "HfLmForSequenceClassification",
        "HfLmForTokenClassification",
        "HfLmForQuestionAnswering",
        "True",
    ]


def test_help_answers_without_loading_torch():
    code = """
import sys
sys.argv[:] = ["hf-lm", "--help"]
from hf_lm.cli import main
try:
    main()
except SystemExit as exit:
    assert exit.code == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    keys = code.replace('"--help"]', '"train", "--help"]')
    assert "data of task chat:" in run_python(keys) and "language_pairs" in run_python(keys)
    # -c sets argv[0] after the fact: run it as the console script does
    result = subprocess.run([sys.executable, "-m", "hf_lm", "--help"], capture_output=True, text=True, check=True)
    assert "train" in result.stdout
    assert "usage: hf-lm" in run_python(code)


def test_training_can_be_imported_where_there_is_no_resource_module():
    """As on Windows."""
    code = """
import sys
import psutil  # on Linux it has the module, on Windows its own ways
sys.modules["resource"] = None
import hf_lm.app.run, hf_lm.planning.plan, hf_lm.hardware as hardware
class Process:
    def memory_info(self):
        return type("Info", (), {"peak_wset": 7})
hardware.psutil.Process = Process
print(hardware.peak_memory())
"""
    assert run_python(code).split() == ["7"]
