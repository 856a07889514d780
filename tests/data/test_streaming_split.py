"""A stream that several processes with several loader workers share: every document once, in every pass."""

import json
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "training"))

from ranks import launch

PROCESSES, WORKERS, BATCH, BLOCK = 2, 2, 5, 40


def batches_of(files: list[str], skip: int, count: int) -> list[list[int]]:
    """The numbers of the documents in each batch that this process gets."""
    import tempfile

    import torch
    from accelerate import skip_first_batches

    from hf_lm import HfLmConfig, HfLmForCausalLM
    from hf_lm.tasks.language_modeling import LanguageModeling
    from hf_lm.tasks.language_modeling_keys import LanguageModelingArguments
    from hf_lm.tokenization import train_tokenizer
    from hf_lm.training.arguments import HfLmTrainingArguments
    from hf_lm.training.keys import ModelArguments
    from hf_lm.training.trainer import HfLmTrainer

    torch.set_num_threads(1)
    arguments = HfLmTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        dataloader_num_workers=WORKERS,
        per_device_train_batch_size=BATCH,
        report_to="none",
        max_steps=1,
        bf16=False,
    )
    data = LanguageModelingArguments(train_file=files, streaming=True, validation_split_percentage=0, block_size=BLOCK)
    task = LanguageModeling(ModelArguments(), data, arguments)
    tokenizer = train_tokenizer([], kind="byte")
    model = HfLmForCausalLM(HfLmConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=300))
    trainer = HfLmTrainer(
        model=model,
        args=arguments,
        train_dataset=task.encode(task.load()["train"], tokenizer, "train"),
        data_collator=task.collator(tokenizer),
        processing_class=tokenizer,
    )
    loader = skip_first_batches(trainer.get_train_dataloader(), skip)  # as the trainer does when it resumes
    batches = []
    for batch in islice(loader, count):
        assert len(batch["input_ids"]) == BATCH
        words = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        batches.append([int(number) for text in words for number in text.replace("#", " ").split()])
    return batches


def write(folder: Path, documents: int, files: int) -> list[str]:
    """Documents `#0000`, `#0001`, ..., in so many files of different sizes."""
    numbers, paths = iter(range(documents)), []
    for file in range(files):
        size = documents if file == files - 1 else documents * (file + 1) // (files * files)
        rows = [json.dumps({"text": f"#{number:04d} "}) for number in islice(numbers, size)]
        paths.append(folder / f"{file}.jsonl")
        paths[-1].write_text("\n".join(rows))
    return list(map(str, paths))


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 4])
def test_each_pass_over_a_stream_gives_every_document_once_to_all_processes_together(tmp_path, files):
    # bos + 6 bytes + eos are 8 tokens: 5 documents a block, 25 a batch; 4 batches a pass for each of 4 workers
    documents = PROCESSES * WORKERS * BATCH * (BLOCK // 8) * 4
    in_one_pass = documents // (PROCESSES * BATCH * (BLOCK // 8))
    paths = write(tmp_path, documents, files)
    ranks = launch(PROCESSES, batches_of, paths, 0, 2 * in_one_pass)
    for start in (0, in_one_pass):
        seen = Counter(n for rank in ranks for batch in rank[start : start + in_one_pass] for n in batch)
        assert seen == Counter(range(documents))
    resumed = launch(PROCESSES, batches_of, paths, in_one_pass + 3, 2)
    assert resumed == [rank[in_one_pass + 3 : in_one_pass + 5] for rank in ranks]


@pytest.mark.slow
def test_a_few_documents_are_shared_block_by_block(tmp_path):
    documents = PROCESSES * BATCH * (BLOCK // 8) * 3  # too few for a share of documents for each of 4 workers
    ranks = launch(PROCESSES, batches_of, write(tmp_path, documents, 3), 0, 6)
    for start in (0, 3):
        seen = Counter(n for rank in ranks for batch in rank[start : start + 3] for n in batch)
        assert seen == Counter(range(documents))


@pytest.mark.parametrize(
    ("files", "readers"),
    [(4, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1), (1, 3), (4, 1)))],
)
def test_loader_workers_lose_and_repeat_nothing(tmp_path, files, readers):
    from torch.utils.data import DataLoader

    from hf_lm.data.arguments import DataArguments
    from hf_lm.data.documents import load_documents
    from hf_lm.data.packing import pack_documents
    from hf_lm.tokenization import train_tokenizer

    data = DataArguments(train_file=write(tmp_path, 310, files), streaming=True, validation_split_percentage=0)
    tokenizer = train_tokenizer([], kind="byte")
    blocks = pack_documents(load_documents(data)["train"], tokenizer, BLOCK, readers)
    assert blocks.num_shards == readers
    words = []
    for row in DataLoader(blocks, batch_size=None, num_workers=2):
        words += tokenizer.decode(row["input_ids"], skip_special_tokens=True).replace("#", " ").split()
    assert Counter(words) == Counter(f"{number:04d}" for number in range(310))


@pytest.mark.slow
def test_one_document_for_two_processes_is_refused_in_words(tmp_path):
    (error,) = {launch(2, refusal, write(tmp_path, 2, 1)[0])[1]}
    assert error == "the training data has less than one row for each of the 2 processes."


def refusal(file: str) -> str | None:
    """What the process says of data that does not suffice."""
    from hf_lm.errors import InputError

    try:
        batches_of([file], 0, 0)
    except InputError as error:
        return str(error)
    return None
