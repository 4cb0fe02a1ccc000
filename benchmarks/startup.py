"""Seconds that short commands take as whole processes, against a Python process that does nothing.

The commands are --help, the help of a stage, a mistyped flag, and a store that does not exist.
"""

import statistics
import subprocess
import sys
import time

RUNS = 7
CALLS = {
    "help": ["--help"],
    "help of a stage": ["distill", "--help"],
    "unknown flag": ["distill", "--stor", "x"],
    "missing store": ["distill", "--store", "nowhere", "--student", "convnet", "--method", "seed", "--out", "x"],
}


def measure() -> dict[str, float]:
    """Median seconds of each command, from the start of the process to its end."""
    bare = _median([sys.executable, "-c", "pass"])
    return {"bare python": bare} | {
        name: _median([sys.executable, "-m", "compress_ssl.cli", *call]) for name, call in CALLS.items()
    }


def _median(command: list[str]) -> float:
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=False)
        times.append(time.perf_counter() - began)
    return round(statistics.median(times), 3)
