"""
Stand-in for `tests/distributed_testing_utils.py` of transformers, which the source archive leaves out: run a function
in several processes on this machine, joined by gloo over localhost.
"""

import functools
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)


def _start_rank_processes(function, args: tuple, nprocs: int) -> None:
    mp.spawn(function, args=args, nprocs=nprocs, join=True)


def _run_rank(rank: int, world_size: int, port: int, function, args: tuple, kwargs: dict) -> None:
    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )
    _set_rank_device(rank)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, *args, **kwargs)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int):
    """Decorate `function(rank, *args)`: a call of the result runs it once in each of `world_size` processes."""

    def decorate(function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            _start_rank_processes(_run_rank, (world_size, port, function, args, kwargs), nprocs=world_size)

        return run

    return decorate
