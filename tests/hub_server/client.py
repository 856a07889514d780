"""
A process whose Hub is the emulator. `HF_ENDPOINT` and its like are read at import, so the real client must start with
them; one process serves many tests, since importing torch and transformers takes seconds.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback


class RemoteError(Exception):
    """What the code raised in the client process: `Type: message`."""


class Client:
    """
    Args:
        endpoint: of the emulator.
        home: directory for the client's cache and token.
        token: sent by default.
        environment: more variables, such as HF_HUB_DISABLE_XET.
    """

    def __init__(self, endpoint: str, home: str, token: str | None, **environment: str):
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE_"))}
        environment = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            **({"HF_TOKEN": token} if token else {}),
            **environment,
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=inherited | environment,
            text=True,
            cwd=home,
        )
        self.output = ""  # what the code of the last call printed, logged or warned

    def __call__(self, code: str, **arguments):
        """
        Run code with the arguments as variables and return what it leaves in `result` (JSON).

        Raises:
            RemoteError: the code raised.
        """
        self.process.stdin.write(
            json.dumps(
                {
                    "code": code,
                    "arguments": {k: str(v) if hasattr(v, "__fspath__") else v for k, v in arguments.items()},
                }
            )
            + "\n"
        )
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.output = answer["output"]
        if answer["error"]:
            raise RemoteError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        output, error, scope = io.StringIO(), None, dict(request["arguments"])
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                exec(request["code"], scope)
            except BaseException as caught:  # SystemExit and the like are answers too
                error = f"{type(caught).__name__}: {caught}"
                traceback.print_exc()
        answer = {"result": scope.get("result"), "error": error, "output": output.getvalue()}
        answers.write(json.dumps(answer, default=str) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
