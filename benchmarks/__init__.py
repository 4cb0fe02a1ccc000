"""Measure speed and memory as ratios within one run: `python -m benchmarks [NAME ...] [--out FILE]` prints JSON."""
