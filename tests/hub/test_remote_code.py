"""A saved model works on a machine that never heard of hf_lm, with the code that lies beside its weights."""

import json
import os
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.dynamic_module_utils import get_imports

import hf_lm
from hf_lm import HfLmForCausalLM
from hf_lm.configuration_hf_lm import AUTO_MAP

CODE = {"configuration_hf_lm.py", "modeling_hf_lm.py"}


def use_anywhere(python: str, model: Path, output: Path, mode: str) -> dict:
    """Run `use_anywhere.py` in a process of its own and return what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HOME": str(output / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [python, Path(__file__).with_name("use_anywhere.py"), model, output, mode],
        env=environment,
        cwd=output,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def install(python: str, *packages: str) -> None:
    """Into the environment of that interpreter."""
    for attempt in range(3):  # registries hiccup
        done = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
        if done.returncode == 0:
            return
        time.sleep(5 * attempt)
    pytest.fail(done.stderr[-2000:])


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def with_the_package(finished_folder, tmp_path_factory) -> dict:
    return use_anywhere(sys.executable, finished_folder, tmp_path_factory.mktemp("installed"), "--with-hf-lm")


def same_results(left: dict, right: dict, tolerance: float = 0.0) -> bool:
    def close(one, other):
        if isinstance(one, dict):
            return all(close(one[key], other[key]) for key in one)
        return one == pytest.approx(other, abs=tolerance) if tolerance else one == other

    return all(close(left[key], right[key]) for key in ("tokens", "outputs", "losses", "trained", "code"))


@pytest.mark.slow
def test_remote_code_does_all_that_the_package_does(finished_folder, with_the_package, tmp_path):
    without = use_anywhere(sys.executable, finished_folder, tmp_path, "--hide-hf-lm")
    assert all(module.startswith("transformers_modules.") for module in without["modules"])
    assert all(module == "hf_lm.modeling_hf_lm" for module in with_the_package["modules"])
    assert same_results(without, with_the_package)
    assert set(without["code"]) >= CODE


def oldest(package: str, repository: Path) -> str:
    """The lower bound that pyproject.toml declares."""
    dependencies = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["dependencies"]
    (bounds,) = [line.removeprefix(package) for line in dependencies if line.startswith(package + ">")]
    bound = bounds.split(",")[0].removeprefix(">=")
    return f"{package}=={bound}.0" if bound.count(".") == 1 else f"{package}=={bound}"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["oldest", "newest"])
def test_a_clean_environment_without_hf_lm(finished_folder, with_the_package, repository, tmp_path, version):
    """Only torch, transformers and accelerate (which `Trainer` asks for) from the registry."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    transformers = oldest("transformers", repository) if version == "oldest" else "transformers>=5.20,<6"
    install(python, "torch>=2.9,<2.14", transformers, "accelerate>=1.12,<2")
    result = use_anywhere(python, finished_folder, make(tmp_path / "out"), "--clean")
    print(result["transformers"], result["tokens"])
    assert all(module.startswith("transformers_modules.") for module in result["modules"])
    assert same_results(result, with_the_package, tolerance=2e-3)


@pytest.mark.slow
def test_a_clean_environment_with_an_older_transformers(finished_folder, with_the_package, tmp_path):
    """What other tools pin; and one that is too old says which is needed."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install(python, "torch>=2.9,<2.14", "transformers==5.5.*", "accelerate>=1.12,<2")
    result = use_anywhere(python, finished_folder, make(tmp_path / "out"), "--clean")
    assert result["transformers"].startswith("5.5.")
    expected = with_the_package | {"losses": result["losses"]}  # its Trainer also counts the tokens without label
    assert same_results(result, expected, tolerance=2e-3)
    install(python, "transformers==5.3.*")
    with pytest.raises(AssertionError, match=r"transformers>=5\.4 is required"):
        use_anywhere(python, finished_folder, make(tmp_path / "older"), "--clean")


@pytest.mark.parametrize("name", sorted(reference.split(".")[1] for reference in AUTO_MAP.values()))
def test_every_class_saves_a_complete_auto_map_and_its_code(tiny_config, tmp_path, name):
    (tiny_config if name == "HfLmConfig" else getattr(hf_lm, name)(tiny_config)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert {path.name for path in tmp_path.glob("*.py")} >= CODE
    for reference in AUTO_MAP.values():
        module, class_name = reference.split(".")
        assert f"class {class_name}(" in (tmp_path / f"{module}.py").read_text()


def test_the_code_needs_torch_and_transformers_only(tiny_model, tmp_path):
    """`get_imports` is what the library itself asks for, of every file, before it runs one."""
    tiny_model.save_pretrained(tmp_path)
    needed = {package for path in tmp_path.glob("*.py") for package in get_imports(path)}
    assert needed - set(sys.stdlib_module_names) <= {"torch", "transformers", "huggingface_hub"}


def test_weights_only(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path, save_code=False)
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is HfLmForCausalLM
    again.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").glob("*.py")} >= CODE


def test_references_to_the_repository_of_origin_do_not_outlive_a_save(tiny_model, tmp_path):
    """The library writes `repo--module.Class` into the config of what it loads from the Hub."""
    tiny_model.config.auto_map = {key: f"owner/m--{value}" for key, value in AUTO_MAP.items()}
    tiny_model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_only_safetensors_are_written_and_read(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny_model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_class_of_the_user_is_left_to_the_library(tiny_config, tmp_path, monkeypatch):
    (tmp_path / "modeling_mine.py").write_text("import hf_lm\nclass Mine(hf_lm.HfLmForCausalLM):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import modeling_mine

    modeling_mine.Mine.register_for_auto_class("AutoModelForCausalLM")
    modeling_mine.Mine(tiny_config).save_pretrained(tmp_path / "out")
    auto_map = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_mine.Mine"
    assert (tmp_path / "out" / "modeling_mine.py").exists()


@pytest.mark.slow
def test_the_library_cannot_run_code_of_a_folder_that_is_not_trusted(model_folder, tmp_path):
    """With the package the installed classes are used; without it, not trusting means not loading."""
    flag = tmp_path / "ran"
    for path in model_folder.glob("*.py"):
        path.write_text(f"open({str(flag)!r}, 'w').close()\n" + path.read_text())
    AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True)
    AutoModelForSequenceClassification.from_pretrained(model_folder)
    code = (
        "import sys\nsys.modules['hf_lm'] = None\nfrom transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(model_folder)!r})"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert process.returncode != 0 and "trust_remote_code=True" in process.stderr
    assert not flag.exists()
