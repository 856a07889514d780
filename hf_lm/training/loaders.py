"""Data loaders of the trainer: streams that each process takes its share of, and held-out sets read to the last row."""

import atexit
import inspect
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import datasets
from datasets.distributed import split_dataset_by_node
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ..data.packing import IGNORED
from ..data.streams import EndlessStream
from ..errors import InputError


@contextmanager
def replaced(target, **values) -> Iterator[None]:
    """Give attributes other values inside of a block."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def columns_of(model: nn.Module) -> set[str]:
    """The columns of a dataset that a model's forward takes."""
    base = getattr(model, "get_base_model", lambda: model)()  # of a model wrapped by PEFT
    return {*inspect.signature(base.forward).parameters, "label", "label_ids", "labels"}


def endless(dataset, args):
    """
    A stream that never ends, of which each process reads its share; other datasets as they are.

    Raises:
        InputError: there is not a row for each process.
    """
    if not isinstance(dataset, IterableDataset) or isinstance(dataset, EndlessStream):
        return dataset
    count = args.world_size
    if isinstance(dataset, datasets.IterableDataset):
        dataset = split_dataset_by_node(dataset, args.process_index, count) if count > 1 else dataset
        if next(iter(dataset), None) is None:
            few = f"has less than one row for each of the {count} processes" if count > 1 else "holds no text"
            raise InputError(f"the training data {few}.")
    return EndlessStream(dataset)


def keep_own_share(loader: DataLoader) -> None:
    """Keep accelerate from dividing a stream again that is divided already."""
    stream = getattr(loader.dataset, "dataset", None)  # inside of accelerate's shard
    if isinstance(stream, EndlessStream) and isinstance(stream.rows, datasets.IterableDataset):
        loader.dataset.num_processes, loader.dataset.process_index = 1, 0


def mask_duplicates(batch: dict, rows: int, args) -> None:
    """
    Mask the labels of duplicated rows of an epoch's last batch, which accelerate pads for all processes to have as many:
    the epoch's first rows must not be learned twice.

    Args:
        rows: those of an epoch.
    """
    labels = batch.get("labels")
    if args.world_size > 1 and labels.ndim == 2:
        left = rows % (args.world_size * len(labels)) or rows
        labels[max(left - args.process_index * len(labels), 0) :] = IGNORED


def ignore_first_signal(seed_worker: Callable | None, worker_id: int) -> None:
    """
    Make a loader's worker ignore a first SIGINT or SIGTERM.

    Schedulers and terminals signal all processes of a run; the training one still needs batches to finish its step. Later
    it ends its workers itself; a second signal ends them at once.

    Args:
        seed_worker: the `worker_init_fn` there was, or None.
    """

    def once(number, frame):
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, once)
    if seed_worker is not None:
        seed_worker(worker_id)


def end_workers(loader: Callable[[], DataLoader | None]) -> None:
    """
    End persistent workers at the end of Python: `multiprocessing` sends one signal, which they ignore, and waits.

    Args:
        loader: a weak reference.
    """
    iterator = getattr(loader(), "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()


def guard_workers(loader: DataLoader) -> DataLoader:
    """A loader whose workers ignore a first signal, and end with the process."""
    inner = getattr(loader, "base_dataloader", loader)  # of accelerate's, which only passes on
    if getattr(inner.worker_init_fn, "func", None) is not ignore_first_signal:
        inner.worker_init_fn = partial(ignore_first_signal, inner.worker_init_fn)
        if inner.persistent_workers:
            atexit.register(end_workers, weakref.ref(inner))
    return loader
