"""Run benchmarks by name (all by default) and print one JSON object: the machine, then one result per benchmark."""

import argparse
import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path

NAMES = (
    "startup", "listing", "codecs", "hydrate", "memory", "loader", "export", "similarity", "step", "students", "live",
    "formats",
)  # fmt: skip


def describe_machine() -> dict[str, object]:
    """Processor, number of cores and versions of the packages."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if "model name" in line),
        platform.processor(),
    )
    packages = {name: version(name) for name in ("torch", "torchvision", "zarr", "numpy", "pillow")}
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), **packages}


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"{', '.join(NAMES)} (default: all)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in NAMES]:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    results: dict[str, object] = {"machine": describe_machine(), "when": time.strftime("%Y-%m-%d")}
    for name in arguments.names or NAMES:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        results[name] = importlib.import_module(f"benchmarks.{name}").measure()
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
