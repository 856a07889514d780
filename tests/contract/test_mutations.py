"""The model tests notice each of the ways in which `mutations.py` breaks the model."""

import mutations
import pytest


@pytest.mark.slow
def test_the_model_as_it_is_passes():
    assert not mutations.failing_tests(None)


@pytest.mark.slow
@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_broken_model_is_noticed(name):
    assert mutations.failing_tests(name)


@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_each_mutation_still_finds_its_line(name):
    file, line, replacement = mutations.MUTATIONS[name]
    source = (mutations.REPOSITORY / "hf_lm" / file).read_text(encoding="utf-8")
    assert source.count(line) == 1 and replacement != line
    compile(source.replace(line, replacement), file, "exec")
