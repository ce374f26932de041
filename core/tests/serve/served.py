"""`polyradix serve` as a process, on NumPy or on the device in POLYRADIX_TEST_DEVICE."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

DEVICE = os.environ.get("POLYRADIX_TEST_DEVICE", "numpy")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether the process has ended; it may be left to nobody who would bury it."""
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


class Process:
    """A running `polyradix serve`, and a client of it."""

    def __init__(self, model: Path, device: str, *options: str) -> None:
        args = ["serve", "--model", str(model), "--load-format", "dummy", "--device", device, "--port", "0", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "polyradix.serve.cli", *args, "--served-model-name", "tiny"],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stderr is not None
        self.log = ""
        for line in self.process.stderr:
            self.log += line
            if "ready at" in line:
                self.line = line
                self.url = line.partition("ready at ")[2].partition(": ")[0]
                self.http = httpx.Client(base_url=self.url, timeout=60)
                return
        raise AssertionError(self.log)

    @property
    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
        (pid,) = found
        return pid

    def metrics(self) -> dict[str, float]:
        lines = [line for line in self.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
        _, rest = self.process.communicate(timeout=60)
        self.log += rest
