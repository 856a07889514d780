"""
What people do with a model from the Hub, on a machine that may never have heard of hf_lm:

    python use_anywhere.py MODEL OUTPUT [--hide-hf-lm | --with-hf-lm]

Every head is loaded, run, saved and loaded again; the language model generates and is fine-tuned for two steps. Prints
what came out as JSON on the last line.
"""

import importlib.util
import json
import os
import sys

model_id, output, mode = sys.argv[1:4] if len(sys.argv) > 3 else (*sys.argv[1:3], "--clean")
if mode == "--hide-hf-lm":
    sys.modules["hf_lm"] = None  # importing it fails, as where it is not installed
elif mode == "--with-hf-lm":
    import hf_lm  # noqa: F401
elif importlib.util.find_spec("hf_lm"):
    sys.exit("this environment has hf_lm")

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainingArguments  # noqa: E402

torch.set_num_threads(1)
HEADS = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
]
result = {"transformers": transformers.__version__, "modules": [], "outputs": {}}
ids = torch.arange(65, 75)[None]


def load(auto_class: str, folder: str):
    torch.manual_seed(0)  # of a head that the checkpoint lacks
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=mode != "--with-hf-lm")
    result["modules"].append(type(model).__module__)
    return model.eval()


def outputs_of(model) -> list[float]:
    with torch.no_grad():
        outputs = model(input_ids=ids)
    return [round(value, 4) for value in outputs[0].flatten()[:8].tolist()]


def code_of(folder: str) -> list[str]:
    names = [name for name in os.listdir(folder) if name.endswith(".py")]
    with open(os.path.join(folder, "config.json")) as file:
        auto_map = json.load(file).get("auto_map", {})
    assert {"AutoConfig", *HEADS} <= set(auto_map), auto_map
    assert not any("--" in reference for reference in auto_map.values()), auto_map
    return sorted(names)


config = AutoConfig.from_pretrained(model_id, trust_remote_code=mode != "--with-hf-lm")
tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=mode != "--with-hf-lm")
# The tokenizer alone needs no code: with False, transformers asks no question about it.
assert AutoTokenizer.from_pretrained(model_id, trust_remote_code=False).get_vocab() == tokenizer.get_vocab()
for head in HEADS:
    model = load(head, model_id)
    result["outputs"][head] = outputs_of(model)
    folder = os.path.join(output, head)
    model.save_pretrained(folder)
    result["code"] = code_of(folder)
    again = load(head, folder)
    assert all(torch.equal(left, right) for left, right in zip(model.parameters(), again.parameters(), strict=True))

# What a merging tool writes: a config that was saved alone, and weights.
model = load("AutoModelForCausalLM", model_id)
folder = os.path.join(output, "merged")
AutoConfig.from_pretrained(model_id, trust_remote_code=mode != "--with-hf-lm").save_pretrained(folder)
weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
assert code_of(folder) == result["code"]
assert outputs_of(load("AutoModelForCausalLM", folder)) == outputs_of(model)

inputs = tokenizer("Call me", return_tensors="pt", return_token_type_ids=False)
result["tokens"] = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()

arguments = TrainingArguments(
    os.path.join(output, "run"),
    max_steps=2,
    save_steps=1,
    logging_steps=1,
    learning_rate=1e-2,
    seed=0,
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
rows = [{"input_ids": (torch.arange(8) + i) % 200, "labels": (torch.arange(8) + i) % 200} for i in range(16)]
trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
trainer.train()
result["losses"] = [round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry]
assert code_of(os.path.join(output, "run", "checkpoint-2")) == result["code"]
trained = load("AutoModelForCausalLM", os.path.join(output, "run", "checkpoint-2"))
assert all(
    torch.equal(left, right) for left, right in zip(trainer.model.parameters(), trained.parameters(), strict=True)
)
result["trained"] = outputs_of(trained)
# A head that starts from the fine-tuned backbone, which was itself saved as remote code.
load("AutoModelForSequenceClassification", os.path.join(output, "run", "checkpoint-2"))
print(json.dumps(result))
