"""Run by `test_other_tools.py` where the tools are installed: what each makes of a model, and of Llama."""

import json

import torch
from llmcompressor.args.dataset_arguments import DatasetArguments
from llmcompressor.pipelines.sequential.helpers import trace_subgraphs
from opacus import GradSampleModule
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_lm import HfLmConfig, HfLmForCausalLM

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
OWN = {"zero_init_residual": False, "initializer_range": 0.2}
KINDS = {
    "default": OWN,
    "learned positions": OWN | {"position_embedding_type": "learned", "norm_type": "layernorm", "norm_bias": True},
    "mixed layers": OWN
    | {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    },
}


def subgraphs_error(model: PreTrainedModel) -> float:
    """Run the model layer by layer, as llm-compressor's GPTQ does, on other ids than it was traced with."""
    ids, outputs = torch.randint(0, 97, (2, 1, 12)), []
    sample, inputs = ({"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids)
    subgraphs = trace_subgraphs(
        model, sample, [type(model.model.layers[0]).__name__], DatasetArguments().tracing_ignore
    )
    assert len(subgraphs) == 1 + len(model.model.layers)
    expected = model(**inputs).logits
    model.lm_head.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    for subgraph in subgraphs:
        inputs |= subgraph.forward(model, **{name: inputs[name] for name in subgraph.input_names})
    return float((outputs[-1] - expected).abs().max())


def sample_gradients_error(model: PreTrainedModel) -> float:
    """Opacus' gradients of each sample, next to those of the samples alone."""
    ids, error = torch.randint(0, 97, (3, 10)), 0.0
    private = GradSampleModule(model.train(), strict=False)
    private(ids, labels=ids, position_ids=torch.arange(10).expand(3, -1), use_cache=False).loss.backward()
    found = {name: parameter.grad_sample for name, parameter in model.named_parameters()}
    private.remove_hooks()
    for row, own in enumerate(ids):
        model.zero_grad()
        model(own[None], labels=own[None], use_cache=False).loss.backward()
        errors = [(found[name][row] - parameter.grad).abs().max() for name, parameter in model.named_parameters()]
        error = max(error, *map(float, errors))
    return error


torch.manual_seed(0)
models = {"llama": LlamaForCausalLM(LlamaConfig(**SIZES))}
models |= {name: HfLmForCausalLM(HfLmConfig(**SIZES, **changes)) for name, changes in KINDS.items()}
results = {}
for name, model in models.items():
    with torch.no_grad():
        results[f"{name}, llm-compressor"] = subgraphs_error(model.eval())
    results[f"{name}, Opacus"] = sample_gradients_error(model)
print(json.dumps(results))
