"""The common model tests of transformers, by its own authors, on the classes of hf_lm (see `library_suite.py`)."""

import re

import library_suite
import pytest

# What a config rules out: there is nothing rotary to scale in a model with learned positions (the test feeds it 768
# positions of 512); scores with a soft cap never take SDPA, which would ignore the cap; and the test builds the rotary
# module from the whole config, where ours gets the part for its layer type.
NOT_APPLICABLE = {
    "gpt2": "not rope_scaling",
    "gemma2": "not sdpa_can_dispatch",
    "everything": "not rope_scaling_frequencies",
}


def run_and_count(folder, *arguments: str, **options) -> dict[str, int]:
    """Run the suite; fail with its own report if a test fails, else return the numbers of its last line."""
    try:
        finished = library_suite.run(folder, arguments=arguments, capture_output=True, text=True, **options)
    except library_suite.SourceUnavailableError as error:
        pytest.fail(str(error), pytrace=False)
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", finished.stdout)
    }
    if finished.returncode:
        pytest.fail(f"{counts}\n{finished.stdout[-8000:]}{finished.stderr[-2000:]}", pytrace=False)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("config", ["default", "llama"])
def test_the_librarys_own_tests_pass(tmp_path, config):
    counts = run_and_count(tmp_path, config=config)
    assert counts["passed"] >= 115, counts
    assert "failed" not in counts and "error" not in counts, counts


@pytest.mark.slow
@pytest.mark.parametrize("config", ["sliding", "olmo2", "neox", "cohere", *NOT_APPLICABLE])
def test_the_librarys_own_tests_pass_on_further_configs(tmp_path, config):
    arguments = ("-k", NOT_APPLICABLE[config]) if config in NOT_APPLICABLE else ()
    assert run_and_count(tmp_path, *arguments, config=config)["passed"] >= 111


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "selection"), [("default", "tp_ or fsdp"), ("everything", "tp_ or fsdp"), ("olmo2", "tp_")]
)
def test_tensor_parallelism_and_fsdp_in_two_processes(tmp_path, config, selection):
    counts = run_and_count(tmp_path, "-k", selection, config=config, distributed=True)
    assert counts["passed"] >= (16 if "fsdp" in selection else 7), counts


def test_we_skip_and_override_none_of_the_librarys_tests(tmp_path):
    """Our test class has no test but its own `test_config`, and nothing in the harness skips."""
    try:
        library_suite.lay_out(tmp_path)
    except library_suite.SourceUnavailableError as error:
        pytest.fail(str(error), pytrace=False)
    sources = [file.read_text(encoding="utf-8") for file in library_suite.HARNESS.glob("*.py")]
    library = (tmp_path / "tests" / "test_modeling_common.py").read_text(encoding="utf-8")
    ours = [name for source in sources for name in re.findall(r"def (test_\w+)", source)]
    assert ours == ["test_config"] and "def test_config(" not in library
    assert not any(re.search(r"skipTest|mark\.skip|xfail|importorskip", source) for source in sources)


def test_an_archive_that_is_not_the_pinned_one_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "hf_lm"
    folder.mkdir()
    archive = folder / f"transformers-{library_suite.transformers.__version__}.tar.gz"
    archive.write_bytes(b"something else")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(library_suite.SourceUnavailableError, match="has SHA-256 .*pinned is"):
        library_suite.source_archive()


def test_an_index_out_of_reach_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, "" if name != "PIP_INDEX_URL" else "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(library_suite.SourceUnavailableError, match="neither in .* nor to be had") as error:
        library_suite.source_archive()
    assert "\n" not in str(error.value)


def test_a_version_without_a_pin_is_said(monkeypatch):
    monkeypatch.setattr(library_suite.transformers, "__version__", "5.99.0")
    with pytest.raises(library_suite.SourceUnavailableError, match=r"pins only 5\.20\.0, .*5\.24\.0: install"):
        library_suite.source_archive()
