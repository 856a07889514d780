"""
The same conversations through TRL's trainers, which take the model as it is:

    pip install -e ".[trl,peft]"
    python recipes/chat/with_trl.py sft runs/smollm2 runs/chat_sft        # supervised, the assistant's words only
    python recipes/chat/with_trl.py dpo runs/chat_merged runs/chat_dpo    # the right answer preferred to another's
    python recipes/chat/with_trl.py grpo runs/chat_merged runs/chat_grpo  # rewarded for the help's own words

Further words are keys of the trainer's configuration, as --max_steps 20.
"""

import sys
from difflib import SequenceMatcher
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import hf_lm  # noqa: F401  registers the architecture
from hf_lm.hardware import device_type, has_fast_bfloat16
from hf_lm.tasks.chat import use_chat_template

DATA = Path(__file__).parent / "data" / "train.jsonl"


def preferences(rows: Dataset) -> Dataset:
    """Each question with its answer, and with the answer to the next question as the worse one."""
    others = [row["messages"][1]["content"] for row in rows]
    return Dataset.from_list(
        [
            {
                "prompt": row["messages"][:1],
                "chosen": row["messages"][1:2],
                "rejected": [{"role": "assistant", "content": other}],
            }
            for row, other in zip(rows, others[1:] + others[:1], strict=True)
            if other != row["messages"][1]["content"]
        ]
    )


def questions(rows: Dataset) -> Dataset:
    """Each question, with the answer that the reward compares with."""
    return Dataset.from_list(
        [{"prompt": row["messages"][:1], "answer": row["messages"][1]["content"]} for row in rows]
    )


def likeness(completions: list, answer: list[str], **kwargs) -> list[float]:
    """The reward: how much of the answer's characters the completion has, in order, from 0 to 1."""
    texts = [completion[0]["content"] for completion in completions]
    return [SequenceMatcher(None, text, right).ratio() for text, right in zip(texts, answer, strict=True)]


def main(kind: str, model_path: str, output_dir: str, *words: str) -> None:
    configs = {"sft": SFTConfig, "dpo": DPOConfig, "grpo": GRPOConfig}
    device = device_type()  # TRL asks for bfloat16 on every machine, and for a GPU
    machine = ["--use_cpu", str(device == "cpu"), "--bf16", str(has_fast_bfloat16(device))]
    machine += ["--output_dir", output_dir]
    (arguments,) = HfArgumentParser(configs[kind]).parse_args_into_dataclasses([*machine, *words])
    rows = load_dataset("json", data_files=str(DATA), split="train")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    use_chat_template(tokenizer)
    model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))
    if kind == "sft":
        arguments.assistant_only_loss = True
        trainer = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    elif kind == "dpo":
        trainer = DPOTrainer(model, args=arguments, train_dataset=preferences(rows), processing_class=tokenizer)
    else:
        trainer = GRPOTrainer(
            model, likeness, args=arguments, train_dataset=questions(rows), processing_class=tokenizer
        )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
