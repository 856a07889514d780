"""
The common model tests of the installed transformers, run on the classes of hf_lm.

The wheel of transformers has no tests, its source archive has. It is fetched once with pip, checked against a pinned
SHA-256 and kept in the user's cache; nothing of it is committed. What the archive leaves out stands in `harness/`.

    python tests/contract/library_suite.py [--config NAME] [--distributed] [PYTEST ARGUMENTS ...]
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

HARNESS = Path(__file__).parent / "harness"
REPOSITORY = Path(__file__).parents[2]
# SHA-256 of transformers-VERSION.tar.gz on the package index, for each release that pyproject.toml allows.
SOURCE_SHA256 = {
    "5.20.0": "d82335f354755ff4dc557fa4080472192d2f19349d59b97e05ab981f4177c679",
    "5.20.1": "25b30879e4c243f00630c1079171ede6d4f6bf76e68f978acd47628a640bc8a0",
    "5.20.2": "080871e061546d720be57f5846fce426f46b44d61574907cc7404c2cba49d180",
    "5.21.0": "43c971a3eb9ab68dc9dfff430f8ab8a0fba09af2f68b608fd70c6245d2ddb8e7",
    "5.21.1": "65e82dfbe8d0d0d6d09d402dca28e60b3f483beadbb7bdd259ea0e33a04e2efa",
    "5.22.0": "f2864f282383820089b21d104d55cb72118b8594f053c2cbeb58d0740f9ff662",
    "5.22.1": "bed9fd76d6f43b4a1a9fc5d0c565ace7c77edbd029784f8cbcdf772cb5e924d8",
    "5.22.2": "55f57e5cbd7c0b500b7a706daa0ecd76567b56ca139e6e02ef0bba0437e3a763",
    "5.23.0": "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71",
    "5.24.0": "906cb8c3cb2123575e263962586a4d21a979ce97feeb95fe6aaf66fe6ae88bf3",
}
STAND_INS = {
    "src/transformers/__init__.py": "",
    "tests/__init__.py": "",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": """config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}
""",
    "tests/utils/tiny_model_summary.json": "{}",
}
PYTEST_INI = "[pytest]\nfilterwarnings = ignore::pytest.PytestUnknownMarkWarning\n"


class SourceUnavailableError(RuntimeError):
    """The archive cannot be had or is not the one that is pinned. One line that says what to do."""


def source_archive() -> Path:
    """
    The checked source archive of the installed transformers, from the cache or the package index.

    Raises:
        SourceUnavailableError: no pin for this version, index out of reach, or another content than the pinned one.
    """
    version = transformers.__version__
    if version not in SOURCE_SHA256:
        raise SourceUnavailableError(
            f"transformers {version} is installed, but SOURCE_SHA256 in {Path(__file__).name} pins only "
            f"{', '.join(SOURCE_SHA256)}: install one of these, or add the SHA-256 of transformers-{version}.tar.gz."
        )
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_lm"
    archive = folder / f"transformers-{version}.tar.gz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as download:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--no-binary", "transformers", f"transformers=={version}", "--dest", download]
            fetched = subprocess.run(command, capture_output=True, text=True)
            if fetched.returncode:
                raise SourceUnavailableError(
                    f"transformers-{version}.tar.gz is neither in {folder} nor to be had from the package index "
                    f"(pip says: {(fetched.stderr.strip().splitlines() or ['nothing'])[-1]}). Connect once, or put it there."
                )
            os.replace(Path(download, archive.name), archive)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SOURCE_SHA256[version]:
        raise SourceUnavailableError(
            f"{archive} has SHA-256 {found}, pinned is {SOURCE_SHA256[version]}: delete it to fetch it again."
        )
    return archive


def lay_out(folder: Path) -> None:
    """Put the library's `tests/test_*.py`, the stand-ins and our harness into `folder`."""
    with tarfile.open(source_archive()) as archive:
        for member in archive:
            parts = Path(member.name).parts[1:]
            if len(parts) == 2 and parts[0] == "tests" and parts[1].endswith(".py"):
                path = folder / "tests" / parts[1]
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())
    for name, content in STAND_INS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    for file in HARNESS.glob("*.py"):
        (folder / "tests" / file.name).write_bytes(file.read_bytes())
    (folder / "pytest.ini").write_text(PYTEST_INI, encoding="utf-8")


def run(
    folder: Path, config: str = "default", distributed: bool = False, arguments: tuple[str, ...] = (), **popen
) -> subprocess.CompletedProcess:
    """
    Run the library's tests in `folder`, an empty one, in a process of their own.

    Args:
        config: a key of `TESTED_CONFIGS`.
        distributed: also the tests that spawn processes (tensor parallelism, FSDP).
        arguments: more for pytest, such as `-k NAME`.
        popen: more for `subprocess.run`.
    """
    lay_out(folder)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_LM_TESTED_CONFIG": config,
        "HF_LM_DISTRIBUTED": str(int(distributed)),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        "PYTEST_ADDOPTS": "",
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.registration"]
    return subprocess.run([*command, "tests/model_case.py", *arguments], cwd=folder, env=environment, **popen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--config", default="default")
    parser.add_argument("--distributed", action="store_true")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder), options.config, options.distributed, tuple(arguments)).returncode


if __name__ == "__main__":
    sys.exit(main())
