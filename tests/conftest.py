"""What every test runs under. Nothing here imports torch: a test that needs it pays for it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))  # torch and faiss: many tests start workers
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once, it does not hang
