"""Every command and code block of the README and the guides runs, in order, page by page."""

import argparse
import contextlib
import doctest
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from hf_lm import HfLmConfig
from hf_lm.cli import COMMANDS, main

REPOSITORY = Path(__file__).parents[2]
GUIDES = REPOSITORY / "recipes" / "guides"
PAGES = [REPOSITORY / "README.md", REPOSITORY / ".github" / "CONTRIBUTING.md", *sorted(GUIDES.glob("*.md"))]
PAGES += sorted((REPOSITORY / "recipes").glob("*/README.md"))
# The same commands, on less: what is shown is that they run, not what comes out.
SHORTER = (
    "--max_steps 2 --logging_steps 1 --max_train_samples 60 --max_eval_samples 4 --eval_strategy steps --eval_steps 2 --save_strategy steps --save_steps 2 "
    "--per_device_train_batch_size 2 --sample_tokens 2"
)
SKIPPED = (
    "pip install",
    "pytest",
    "ruff",
    "mkdocs",
    "hf auth login",
    "hf download",
)  # .ci/run does what the README begins with


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block that is meant to be run."""
    found = re.findall(r"^( *)```(bash|python)\n(.*?)^\1```$", page.read_text(encoding="utf-8"), re.S | re.M)
    return [(language, textwrap.dedent(text)) for _, language, text in found]


def shorter(line: str) -> str:
    """A training command with fewer steps; anything else as it is."""
    if re.search(r"hf[-_]lm train ", line):
        command, comment = re.fullmatch(r"(.*?)(\s+#.*)?", line).groups(default="")
        return f"{command} {SHORTER}{'' if re.search('--output_dir|--resume', command) else ' --overwrite'}{comment}"
    return line


def run_line(line: str) -> None:
    """One command: ours in this process, which saves loading torch each time; others by the shell."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["hf-lm"] and not re.search(r"[|&<>]", re.sub(r'"[^"]*"', "", line)):
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            code = main(words[1:])
        # A page may show what is refused; then it says so beside the command.
        assert code == (2 if "# refused" in line else 0), f"{line}\n{stderr.getvalue()}"
        return
    done = subprocess.run(["bash", "-ec", line], capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def run_bash(text: str) -> None:
    lines = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip() and line[0] != "#"]
    background = []
    try:
        for line in lines:
            parts = [part.strip() for part in line.split("&&")]
            for part in (
                parts if all(re.match(r"pip |hf-lm |pytest|ruff ", part) for part in parts) else [line.strip()]
            ):
                if part.startswith(SKIPPED):
                    continue
                if part.endswith("&"):
                    background.append(subprocess.Popen(["bash", "-c", f"exec {part[:-1]}"], stdout=subprocess.DEVNULL))
                else:
                    run_line(shorter(part))
    finally:
        for process in background:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder that looks like a fresh clone in which the default recipe has run, and a cache that holds SmolLM2."""
    from helpers.real_checkpoint import smollm2_folder

    folder = tmp_path_factory.mktemp("clone")
    for path in REPOSITORY.iterdir():
        if path.name not in ("runs", ".git"):
            (folder / path.name).symlink_to(path)
    repository = folder / "cache" / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / "0").symlink_to(smollm2_folder())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    before, path = Path.cwd(), os.environ["PATH"]
    os.chdir(folder)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{path}"
    os.environ["HF_HUB_CACHE"] = str(folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
        run_line(shorter("hf-lm train recipes/moby_dick/config.yaml"))
        yield folder
    os.chdir(before)
    os.environ["PATH"] = path
    del os.environ["HF_HUB_CACHE"]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_block_of_a_page_runs(page, workplace):
    for run in (workplace / "runs").iterdir():  # a page makes what it needs; the default recipe has run
        if run.is_file():
            run.unlink()
        elif run.name != "moby_dick":
            shutil.rmtree(run)
    for language, text in blocks(page):
        if language == "bash":
            run_bash(text)
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(text, str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.slow
def test_examples_of_the_reference_run(workplace):
    sources = [path for path in sorted((REPOSITORY / "hf_lm").rglob("*.py")) if ">>> " in path.read_text()]
    assert len(sources) >= 3
    for path in sources:
        name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
        assert result.attempted and not result.failed, name


def test_every_block_is_of_a_kind_that_is_run():
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.M)
        kinds = [kind for kind in fences[::2] if kind != "text"]  # a picture
        assert set(kinds) <= {"bash", "python"} and set(fences[1::2]) <= {""}, page
        assert len(blocks(page)) == len(kinds), page


def test_what_pip_is_told_is_told_by_the_workflow_too_and_extras_exist():
    workflow = (REPOSITORY / ".ci" / "run").read_text().replace("pip install -q", "pip install")
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for names in re.findall(r"""pip install (?:-e )?["'](?:\.|hf-lm)\[([\w,-]+)\]""", text):
            assert set(names.split(",")) <= set(extras), f"{page}: {names}"
    for _, text in blocks(REPOSITORY / "README.md"):
        for command in re.findall(r"^pip install [^&\n]*[^&\s]", text, re.M):
            assert command in workflow, command


def test_options_and_keys_named_in_a_sentence_exist():
    from hf_lm.tasks.recipe import recipe_keys

    keys = {*recipe_keys()}
    options, parser = {"--help", "--debug", *(f"--{key}" for key in keys)}, argparse.ArgumentParser()
    options |= {f"--{key.replace('_', '-')}" for key in keys}
    for module, _ in COMMANDS.values():
        parser = argparse.ArgumentParser()
        importlib.import_module(f"hf_lm.cli.{module}").add_arguments(parser)
        options |= set(re.findall(r"(?<![\w-])--[\w-]+", parser.format_help()))
    keys |= {field.name for field in fields(HfLmConfig)}
    for page in (REPOSITORY / "README.md", *(page for page in PAGES if page.parent == GUIDES)):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for span in re.findall(r"`([^`]+)`", text):
            if command := re.match(r"hf-lm ([a-z][a-z-]*)", span):
                assert command[1] in COMMANDS, f"{page}: {span}"
            if not span.startswith(("pip ", "accelerate ", "torchrun ")):
                assert set(re.findall(r"(?<!\S)--[\w-]+", span)) <= options, f"{page}: {span}"
            if key := re.fullmatch(r"([a-z0-9]+(?:_[a-z0-9]+)+)(?:: .*)?", span):
                assert key[1] in keys, f"{page}: {span}"


def test_the_chinese_readme_keeps_step():
    english, chinese = (
        path.read_text(encoding="utf-8") for path in (REPOSITORY / "README.md", GUIDES / "README.zh.md")
    )

    def code(page: Path) -> list[str]:
        return [re.sub(r"#.*", "", text) for _, text in blocks(page)]

    assert [text for text in code(GUIDES / "README.zh.md") if text in code(REPOSITORY / "README.md")] == code(REPOSITORY / "README.md")  # fmt: skip
    for pattern in (r"^#+ ", r"^\|", r"^!\["):  # headings, rows, pictures
        assert len(re.findall(pattern, chinese, re.M)) == len(re.findall(pattern, english, re.M)), pattern
    numbers = [set(re.findall(r"\d[\d,.]*\d|\d", text)) for text in (english, chinese)]
    assert numbers[0] <= numbers[1]
    spans = [
        {part for span in re.findall(r"`([^`\n]+)`", text) for part in span.split("`, `")}
        for text in (english, chinese)
    ]
    assert spans[0] <= spans[1]
    linked = [
        {(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s:]+)\)", text)}
        for page, text in ((REPOSITORY / "README.md", english), (GUIDES / "README.zh.md", chinese))
    ]
    assert linked[0] - {GUIDES / "README.zh.md"} <= linked[1]


def test_numbers_of_the_readme_are_those_of_the_cards():
    """Scores, and seconds of training."""

    def card(name: str) -> str:
        return (REPOSITORY / "model_cards" / name / "README.md").read_text(encoding="utf-8")

    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    said = {"moby_dick": re.findall(r"\*\*(?=\d+ seconds of training, (\d\.\d+) bits per byte)", text)}
    for row in re.finditer(r"^\| \[(\w+)\]\(recipes/.*$", text, re.M):
        said[row[1]] = re.findall(r"(?<![\w-])\d+\.\d+|\d+(?=%)", row[0])
    assert len(said) == 5 and all(said.values())
    seconds = re.findall(r"(\d+) seconds of training", text)
    taken = [
        float(re.search(r"\| training time \(seconds\) \| ([\d.]+)", card(name))[1])
        for name in ("moby_dick", "sentiment", "translation")
    ]
    assert [int(number) for number in seconds] == [round(number) for number in taken]
    for name, numbers in said.items():
        written = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", card(name))
        found = [float(number.replace(",", "")) for number in written]
        for number in numbers:
            digits = len(number.partition(".")[2])
            assert any(float(number) in (round(one, digits), round(100 * one, digits)) for one in found), (
                name,
                number,
            )


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not link.startswith(("http://", "https://")):
                assert (page.parent / link).exists(), f"{page}: {link}"


def test_lists_are_lists_on_github_and_on_the_site():
    """Python-Markdown, which makes the site, wants an empty line before a list and four spaces before a nested one."""
    for page in [*PAGES, *sorted((REPOSITORY / "hf_lm").rglob("*.md"))]:
        text = re.sub(
            r"^```.*?^```$|<!--.*?-->|\A---.*?^---$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M
        )
        item = r"(?:[-*]|\d+\.) "
        assert not re.search(rf"^(?! |{item}).+\n{item}", text, re.M), page
        assert not re.search(rf"^ {{1,3}}{item}", text, re.M), page


def test_the_readme_names_every_command():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`{name}`" not in text] == []


@pytest.fixture(scope="module")
def reference():
    """The module that writes the reference when the site is built."""
    return runpy.run_path(str(GUIDES / "reference.py"))


def test_the_reference_tells_of_everything(reference):
    from hf_lm.serving.protocol import REFUSED, ChatRequest, CompletionRequest
    from hf_lm.tasks.recipe import recipe_keys
    from hf_lm.training.verdicts import VERDICTS

    sections = {name: write() for name, write in reference["SECTIONS"].items()}
    listed = {name: set(re.findall(r"^\| \[?`([^`]+)`", text, re.M)) - {"hf-lm"} for name, text in sections.items()}
    assert listed["commands"] == set(COMMANDS)
    assert listed["recipe keys"] | listed["training arguments"] >= {*recipe_keys()}
    assert listed["training arguments"] >= set(VERDICTS)
    assert listed["server fields"] >= {*REFUSED, *ChatRequest.model_fields, *CompletionRequest.model_fields}
    pages = reference["pages"]()
    for name in COMMANDS:
        assert f"\n## {name}\n" in pages["commands.md"] and f"usage: hf-lm {name} " in pages["commands.md"]
    for name in reference["MODULES"]:
        assert importlib.import_module(f"hf_lm.{name}").__doc__ and f"{name}.md" in pages


def test_the_page_of_the_reference_has_a_place_for_each_table(reference):
    text = (GUIDES / "reference.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- (.*?) -->", text) == list(reference["SECTIONS"])


def test_the_site_is_built_with_warnings_as_errors():
    for path in (".ci/run", ".github/workflows/docs.yml"):
        text = (REPOSITORY / path).read_text(encoding="utf-8")
        # with --quiet, mkdocs counts no warnings
        assert re.search(r"mkdocs build --strict -f \.github/mkdocs\.yml", text) and ".[docs]" in text, path


def test_the_table_of_formats_is_that_of_the_code():
    page = runpy.run_path(str(GUIDES / "formats.py"))["page"]()
    assert (GUIDES / "import_export.md").read_text(encoding="utf-8") == page, "run recipes/guides/formats.py"


def test_the_workflows_run_the_quick_tests_at_each_push_and_ci_run_each_night():
    folder = REPOSITORY / ".github" / "workflows"
    jobs = {path.stem: yaml.safe_load(path.read_text())["jobs"] for path in folder.glob("*.yml")}
    steps = {name: str([job["steps"] for job in of_file.values()]) for name, of_file in jobs.items()}
    assert "pytest" in steps["ci"] and ".ci/run" in steps["nightly"]
    minimum = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"]
    assert minimum == ">=" + jobs["ci"]["quick"]["strategy"]["matrix"]["python"][0]
