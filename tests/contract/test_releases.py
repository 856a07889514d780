"""What newer releases of transformers rename: both names work, and nothing of ours uses a deprecated one."""

import logging
import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache
from transformers.utils import logging as library_logging

from hf_lm import HfLmForSequenceClassification
from hf_lm.functional_hf_lm import CACHE_NAME

IDS = torch.tensor([[5, 17, 33, 8]])


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def deprecations():
    """A function that returns what transformers or Python has called deprecated since the test began."""
    messages = Messages()
    library_logging.warning_once.cache_clear()
    logging.getLogger("transformers").addHandler(messages)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [
            str(text)
            for text in [*messages.texts, *(f"{one.category.__name__} {one.message}" for one in caught)]
            if any(word in str(text) for word in ("deprecated", "DeprecationWarning", "FutureWarning"))
        ]
    logging.getLogger("transformers").removeHandler(messages)


def training_arguments(folder, **keys) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=2, eval_strategy="steps", eval_steps=1, report_to="none", use_cpu=True, **keys
    )


def test_training_and_evaluation_use_no_deprecated_name(tiny_config, tiny_model, tmp_path, deprecations):
    fields = TrainingArguments.__dataclass_fields__
    keys = {name: True for name in ("activation_checkpointing",) if name in fields}
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    trainer = Trainer(tiny_model, training_arguments(tmp_path / "lm", **keys), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "saved")
    tiny_config.use_cache = True
    labelled = [{"input_ids": IDS[0], "labels": 1}] * 4
    head = HfLmForSequenceClassification(tiny_config)
    trainer = Trainer(head, training_arguments(tmp_path / "head"), train_dataset=labelled, eval_dataset=labelled)
    trainer.train()
    assert trainer.predict(labelled).predictions.shape == (4, 2)  # and no cache
    assert not deprecations()


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}]
)
def test_generation_uses_no_deprecated_name(tiny_model, deprecations, settings):
    model = tiny_model.eval()
    first = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True, use_cache=True, **settings)
    assert first[CACHE_NAME].get_seq_length() == first.sequences.shape[1] - 1
    assert not deprecations()


def test_both_names_of_the_cache_work(tiny_model):
    model = tiny_model.eval()
    with torch.no_grad():
        expected = model(IDS).logits[:, -1]
        for name in ("past_key_values", "cache"):
            past = model(IDS[:, :3], use_cache=True)[CACHE_NAME]
            output = model(IDS[:, 3:], **{name: past})
            assert output[CACHE_NAME] is past and past.get_seq_length() == 4
            torch.testing.assert_close(output.logits[:, -1], expected)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_recomputed_layer_does_not_write_its_keys_twice(tiny_model, name):
    getattr(tiny_model.train(), "activation_checkpointing_enable", tiny_model.gradient_checkpointing_enable)()
    cache = DynamicCache(config=tiny_model.config)
    tiny_model(IDS, labels=IDS, **{name: cache}).loss.backward()
    assert cache.get_seq_length() == 0
