"""Several processes that find each other as those of torchrun do, forked from one that has imported everything."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "hf_lm.app.run", "hf_lm.tasks.language_modeling"])


def _rank(function: Callable, connection, environment: dict[str, str], arguments: tuple) -> None:
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, which need not import everything again
    import torch

    torch.set_num_threads(1)
    try:
        result = function(*arguments), None
    except BaseException:
        result = None, traceback.format_exc()
    connection.send_bytes(pickle.dumps(result))  # `send` would leave tensors in this process
    connection.close()


def launch(count: int, function: Callable, *arguments, seconds: float = 240) -> list:
    """
    What a function of a module returns in each of `count` processes.

    Raises:
        AssertionError: with the traceback, if it raises in one of them; or none has answered after `seconds`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        ours, theirs = _context.Pipe()
        variables = {name: str(value) for name, value in environment.items()}
        process = _context.Process(target=_rank, args=(function, theirs, variables, arguments), daemon=False)
        process.start()
        theirs.close()
        processes.append((process, ours))
    try:
        results = []
        for rank, (_, connection) in enumerate(processes):
            assert connection.poll(seconds), f"rank {rank} has not answered after {seconds} s"
            result, error = pickle.loads(connection.recv_bytes())
            assert error is None, f"rank {rank}: {error}"
            results.append(result)
        return results
    finally:
        for process, _ in processes:
            process.join(5)
            process.kill()


def take_cpus_for_gpus() -> None:
    """Let accelerate shard here: it leaves models whole on what it takes for CPUs, and the code is the same."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    initialize = PartialState.__init__

    def as_accelerators(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_XPU

    PartialState.__init__ = as_accelerators


def command(*argv: str) -> tuple[int, str]:
    """Run an `hf-lm` command in this process: its exit code, and what it wrote on standard error."""
    import io
    from contextlib import redirect_stderr

    from accelerate.state import AcceleratorState

    from hf_lm.cli import main

    AcceleratorState._reset_state()
    with redirect_stderr(io.StringIO()) as stream:
        code = main(list(argv))
    return code, stream.getvalue()
