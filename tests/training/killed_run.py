"""
A training run in a process that is going to be killed; `test_kills.py` starts it from a fork server.

The run is that of `hf-lm train`. Only the disk is slow here, so that many kills fall into saving, and each batch is
announced, so that the one who kills can choose a moment.
"""

import gc
import multiprocessing
import os
import random
import sys
import time

gc.freeze()  # what the server has imported is never garbage: looking through it takes as long as half a run


def _slow(function, seconds: random.Random):
    def slowly(*arguments, **options):
        time.sleep(seconds.uniform(0, 0.01))
        result = function(*arguments, **options)
        time.sleep(seconds.uniform(0, 0.01))
        return result

    return slowly


def run(recipe: str, overrides: list[str], log: str, environment: dict[str, str], slow_disk: bool, announce) -> None:
    """
    Run a recipe.

    Args:
        log: file that receives what the run prints.
        environment: variables that make it one of several processes.
        announce: connection that gets a byte for each batch.
    """
    os.setsid()  # the loader's workers are killed along
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers
    import torch

    from hf_lm.cli import main
    from hf_lm.training.trainer import HfLmTrainer

    torch.set_num_threads(1)
    training_step = HfLmTrainer.training_step

    def announced(*arguments, **options):
        announce.send_bytes(b"b")
        return training_step(*arguments, **options)

    HfLmTrainer.training_step = announced
    if slow_disk:
        seconds = random.Random(os.getpid())
        os.fsync, os.rename = _slow(os.fsync, seconds), _slow(os.rename, seconds)
    code = main(["--debug", "train", recipe, *overrides])
    sys.stderr.flush()
    os._exit(code)
