"""
The library's common model tests on the classes of hf_lm, as a model inside transformers has them.

This file is copied beside them (see `library_suite.py`). It adds the tester that makes configs and inputs; it skips
and overrides no test. `HF_LM_TESTED_CONFIG` picks the config, `HF_LM_DISTRIBUTED=1` the spawned two-process tests.
"""

import os
import unittest

import torch
from transformers.testing_utils import torch_device

from hf_lm import (
    HfLmConfig,
    HfLmForCausalLM,
    HfLmForQuestionAnswering,
    HfLmForSequenceClassification,
    HfLmForTokenClassification,
    HfLmModel,
)

from . import test_fsdp_mixin, test_tensor_parallel_mixin
from .generation.test_utils import GenerationTesterMixin
from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_pipeline_mixin import PipelineTesterMixin
from .test_training_mixin import TrainingTesterMixin
from .tested_configs import TINY, tiny_config

CONFIG_NAME = os.environ.get("HF_LM_TESTED_CONFIG", "default")
if os.environ.get("HF_LM_DISTRIBUTED") == "1":  # the two lists name the models that the library's own runs cover
    test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
    test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


class HfLmModelTester:
    causal_lm_class = HfLmForCausalLM
    base_model_class = HfLmModel
    sequence_classification_class = HfLmForSequenceClassification
    batch_size = 13
    seq_length = 7
    is_training = True
    num_hidden_layers = TINY["num_hidden_layers"]
    hidden_size = TINY["hidden_size"]
    num_attention_heads = TINY["num_attention_heads"]
    vocab_size = TINY["vocab_size"]
    num_labels = TINY["num_labels"]

    def get_config(self) -> HfLmConfig:
        return tiny_config(CONFIG_NAME)

    def prepare_config_and_inputs_for_common(self) -> tuple[HfLmConfig, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        mask = torch.tril(torch.ones(shape, dtype=torch.long, device=torch_device))
        return self.get_config(), {"input_ids": ids_tensor(shape, self.vocab_size), "attention_mask": mask}


class HfLmModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    PipelineTesterMixin,
    TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
    unittest.TestCase,
):
    model_tester = None  # the mixins declare an abstract property
    all_model_classes = (
        HfLmModel,
        HfLmForCausalLM,
        HfLmForSequenceClassification,
        HfLmForTokenClassification,
        HfLmForQuestionAnswering,
    )
    all_generative_model_classes = (HfLmForCausalLM,)
    pipeline_model_mapping = {
        "feature-extraction": HfLmModel,
        "text-generation": HfLmForCausalLM,
        "text-classification": HfLmForSequenceClassification,
        "zero-shot": HfLmForSequenceClassification,
        "token-classification": HfLmForTokenClassification,
        "question-answering": HfLmForQuestionAnswering,
    }
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = HfLmModelTester()
        self.config_tester = ConfigTester(self, config_class=HfLmConfig, hidden_size=32)

    def test_config(self):
        self.config_tester.run_common_tests()
