"""A plugin for pytest that gives our classes what those inside transformers have by being listed there."""

import os

import torch
from transformers.models.auto import modeling_auto

import hf_lm

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
hf_lm.register_auto_classes()
for mapping, name in [
    (modeling_auto.MODEL_MAPPING_NAMES, "HfLmModel"),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "HfLmForCausalLM"),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "HfLmForSequenceClassification"),
    (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "HfLmForTokenClassification"),
    (modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, "HfLmForQuestionAnswering"),
]:
    mapping["hf_lm"] = name
