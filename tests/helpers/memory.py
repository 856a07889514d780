"""How much memory a block of code takes."""

import re
import threading
from pathlib import Path


class PeakMemory:
    """The most anonymous memory that this process holds, above what it held before."""

    @staticmethod
    def now() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024

    def __enter__(self):
        self.before = self.peak = self.now()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.005):
            self.peak = max(self.peak, self.now())

    def __exit__(self, *error) -> None:
        self.over.set()
        self.thread.join()
        self.bytes = self.peak - self.before
