"""
A process that has imported everything once and runs each `hf-lm` command in a fork of itself: a crash of the interpreter,
a hang, a write to a wrong place or the start of a program is seen from outside, and a run costs no imports.

One JSON object a line: `{"argv", "cwd", "writable", "seconds", "stdin"}` in, an `Outcome`'s fields out. It has one thread, so that
forking is safe.
"""

import gc
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MEMORY = 4 << 30  # bytes that a command may take beyond what is loaded already
# Audit events (docs.python.org/3/library/audit_events.html) that change the file system: the place of each path among
# the arguments, and that of the folder (a file descriptor, or -1) it is relative to.
CHANGES = {
    "os.mkdir": {0: 2}, "os.remove": {0: 1}, "os.rmdir": {0: 1}, "os.rename": {0: 2, 1: 3}, "os.link": {1: 3},
    "os.symlink": {1: 2}, "os.truncate": {0: None}, "os.chmod": {0: 2}, "os.chown": {0: 3},
}  # fmt: skip
# What no input may bring about: another program, a connection, a name looked up for a pickle.
FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
)
HARMLESS = ("git", "uname")  # what a training run asks: the commit of its code, the machine


def watch(writable: list[str], report) -> None:
    """Call `report(line)` for each forbidden event and each change outside of the writable folders."""
    allowed = tuple(os.path.realpath(path) + os.sep for path in writable)

    def is_outside(path, folder: int = -1) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False  # a file that is open already
        start = os.getcwd() if folder in (-1, None) else os.readlink(f"/proc/self/fd/{folder}")
        real = os.path.realpath(os.path.join(start, os.fsdecode(path)))
        return not (real + os.sep).startswith(allowed) and real != os.devnull

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITES and is_outside(path):
                report(f"wrote {os.fsdecode(path)}")
        elif event in CHANGES:
            for place, folder in CHANGES[event].items():
                if is_outside(arguments[place], -1 if folder is None else arguments[folder]):
                    report(f"{event} {os.fsdecode(arguments[place])}")
        elif event in FORBIDDEN and str(arguments[0]) not in HARMLESS:
            report(f"{event} {str(arguments)[:200]}")

    sys.addaudithook(hook)


def child(request: dict, files: dict[str, str]) -> None:
    """Run the command and leave the process, whatever happens."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(files[name], os.O_WRONLY), number)
    os.dup2(os.open(files["stdin"], os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(request["cwd"])
    events = os.open(files["events"], os.O_WRONLY | os.O_APPEND)
    watch(request["writable"], lambda line: os.write(events, line.encode("utf-8", "replace") + b"\n"))
    code = 1
    try:
        from hf_lm.cli import main

        code = main(request["argv"])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code & 0xFF)


def outcome(request: dict, aside: str) -> dict:
    """Fork, wait, and say what happened."""
    files = {name: os.path.join(aside, name) for name in ("stdin", "stdout", "stderr", "events")}
    for name, path in files.items():
        Path(path).write_text(request["stdin"] if name == "stdin" else "")
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(request, files)
    status, hung = None, False
    while status is None:
        done, value, usage = os.wait4(pid, os.WNOHANG)
        if done:
            status = value
        elif time.monotonic() - start > request["seconds"]:
            hung = True
            os.kill(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
        else:
            time.sleep(0.002)
    texts = {name: Path(path).read_bytes().decode(errors="replace") for name, path in files.items() if name != "stdin"}
    return {
        "code": os.waitstatus_to_exitcode(status),
        "hung": hung,
        "seconds": time.monotonic() - start,
        "peak_bytes": usage.ru_maxrss << 10,
        **texts,
    }


def load_everything() -> None:
    """What the commands import when they run, and what that imports when it is first used."""
    import importlib

    import torch

    import hf_lm
    from hf_lm.cli import COMMANDS

    torch.set_num_threads(1)
    hf_lm.register_auto_classes()
    for module in [f"hf_lm.cli.{module}" for module, _ in COMMANDS.values()] + [
        "datasets.packaged_modules.json.json", "datasets.packaged_modules.csv.csv", "pandas", "pyarrow.parquet",
        "datasets.packaged_modules.parquet.parquet", "hf_lm.evaluation.text", "hf_lm.evaluation.sentences",
        "hf_lm.app.run", "hf_lm.tasks.language_modeling", "hf_lm.interop.convert", "hf_lm.hub.doctor", "matplotlib.font_manager",
        "matplotlib.figure", "matplotlib.backends.backend_agg", "PIL.JpegImagePlugin", "PIL.PngImagePlugin",
        "hf_lm.hub.push", "transformers.models.llama.modeling_llama", "transformers.generation",
        "transformers.models.auto.tokenization_auto", "tensorboard.summary.writer.event_file_writer",
        "torch.utils.tensorboard", "sympy", "torch._dynamo",
    ]:  # fmt: skip
        importlib.import_module(module)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers goes to the caller
    load_everything()
    gc.freeze()  # or each collection in a fork looks at all of that again
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    aside = tempfile.mkdtemp()
    for line in sys.stdin:
        answers.write(json.dumps(outcome(json.loads(line), aside)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
