"""Seconds and peak MB of one step of the similarity loss with two banks, against two other computations.

"plain" is the loss as the released code of CompRess computes it: both banks are cloned, whole B x K matrices of
similarities and softmaxes are kept, and autograd computes the gradient. "floor" is only the four matrix products that
one pass over the banks needs: two of similarities and two of weighted sums of anchors, written to allocated memory.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from compress_ssl.pipeline.methods.similarity import relation_kl
from compress_ssl.pipeline.models.precision import l2_normalize

B, K, D, d, TAU, THREADS, ROUNDS = 256, 128_000, 2048, 512, 0.04, 2, 9


def measure() -> dict[str, object]:
    """Medians over ROUNDS rounds in which the steps alternate; a ratio is formed within each round.

    Seconds are given in wall-clock time and in processor time, which depends less on other work on the machine.
    "MB" is the peak of resident memory above that of the inputs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    inputs = make_inputs()
    steps: dict[str, Callable[[], object]] = {
        name: functools.partial(loss_and_gradient, loss, inputs) for name, loss in LOSSES.items()
    }
    steps["floor"] = make_products(inputs)
    rounds = [{name: _seconds(step) for name, step in steps.items()} for _ in range(ROUNDS + 1)][1:]
    plain_loss, plain_gradient = loss_and_gradient(plain, inputs)
    our_loss, our_gradient = loss_and_gradient(ours, inputs)
    torch.set_num_threads(threads)
    mb = {name: _measure_peak(name) for name in LOSSES}
    times = {
        clock: {
            "seconds": {name: _median(one[name][n] for one in rounds) for name in steps},
            "ours / plain": _median(one["ours"][n] / one["plain"][n] for one in rounds),
            "ours / floor": _median(one["ours"][n] / one["floor"][n] for one in rounds),
        }
        for n, clock in enumerate(("wall", "processor"))
    }
    return {
        **times,
        "MB": mb,
        "memory, ours / plain": round(mb["ours"] / mb["plain"], 4),
        "loss, relative difference": float(f"{abs(plain_loss - our_loss) / abs(plain_loss):.1e}"),
        "gradient, relative difference": float(f"{(plain_gradient - our_gradient).norm() / plain_gradient.norm():.1e}"),
    }


def plain(t: Tensor, teacher_bank: Tensor, s: Tensor, student_bank: Tensor) -> Tensor:
    """The loss as the released code of CompRess computes it."""
    logits = [
        (bank.clone() @ l2_normalize(x).T).T.div(TAU).contiguous() for bank, x in ((teacher_bank, t), (student_bank, s))
    ]
    return torch.nn.functional.kl_div(logits[1].log_softmax(1), logits[0].softmax(1), reduction="batchmean")


def ours(t: Tensor, teacher_bank: Tensor, s: Tensor, student_bank: Tensor) -> Tensor:
    """The loss as this project computes it."""
    return relation_kl(t, teacher_bank, s, student_bank, TAU, TAU)


LOSSES = {"plain": plain, "ours": ours}


def make_inputs(k: int = K) -> list[Tensor]:
    """Teacher rows (B, D) and bank (k, D), student rows (B, d) and bank (k, d), random; the banks are unit vectors.

    They are filled in place, so that the peak of memory before a step is their size.
    """
    generator = torch.Generator().manual_seed(0)
    parts = [torch.empty(n, width).normal_(generator=generator) for width in (D, d) for n in (B, k)]
    for bank in parts[1::2]:
        for block in bank.split(4096):
            block.div_(block.norm(dim=1, keepdim=True))
    return parts


def loss_and_gradient(loss: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, Tensor]:
    """The loss and its gradient (B, d) with respect to the student's rows."""
    t, teacher_bank, s, student_bank = inputs
    s = s.clone().requires_grad_()
    value = loss(t, teacher_bank, s, student_bank)
    value.backward()
    assert s.grad is not None
    return float(value.detach()), s.grad


def make_products(inputs: list[Tensor]) -> Callable[[], None]:
    """A function that computes only the four matrix products over the whole banks."""
    t, teacher_bank, s, student_bank = inputs
    similarity, weights, sums = torch.empty(K, B), torch.rand(2 * B, K), torch.empty(2 * B, d)

    def products() -> None:
        torch.mm(teacher_bank, t.T, out=similarity)
        torch.mm(student_bank, s.T, out=similarity)
        torch.mm(weights, student_bank, out=sums)  # both weighted sums of anchors at once

    return products


def _seconds(call: Callable[[], object]) -> tuple[float, float]:
    """(seconds of wall-clock time, processor seconds of all threads)"""
    began = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def _median(numbers: Iterable[float]) -> float:
    return round(statistics.median(numbers), 3)


def _measure_peak(name: str) -> float:
    """Peak MB of resident memory of one step, above that of its inputs, measured in a new process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    command = [sys.executable, "-m", "benchmarks.similarity", name]
    peak: float = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    return peak


def main(name: str) -> None:
    """Print the peak MB of one step with this loss, above that of its inputs."""
    torch.set_num_threads(THREADS)
    loss_and_gradient(LOSSES[name], make_inputs(256))  # the first step also loads libraries and allocates their buffers
    inputs = make_inputs()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; ru_maxrss may hold the peak of the parent process
    before = resident("VmRSS")
    loss_and_gradient(LOSSES[name], inputs)
    print(json.dumps(round(resident("VmHWM") - before, 1)))


def resident(field: str) -> float:
    """MB of resident memory of this process, now (VmRSS) or at the peak (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main(sys.argv[1])
