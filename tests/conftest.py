"""What every test runs under. Nothing here imports torch: a test that needs it pays for it."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))  # torch and faiss: many tests start workers
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as cli.main says: spinning threads starve the others
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once, it does not hang

settings.register_profile("house", deadline=None, derandomize=True)  # busy machines; the same examples
settings.load_profile("house")
