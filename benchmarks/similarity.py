"""The similarity loss against the plain formulation of the CompRess release: time and memory of one step, 2q.

Plain: both banks cloned, whole B x K similarities and softmaxes, the gradient by autograd. The floor: the four
matrix products that one pass needs (two similarities, two pulls), alone, into memory that is there already.
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
    """Medians over alternating steps, ratios over neighbouring ones. MB: peak resident above the inputs.

    Processor time beside the clock's, because it says more where others are at work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    inputs = made()
    acts = {**{name: functools.partial(step, loss, inputs) for name, loss in STEPS.items()}, "floor": products(inputs)}
    rounds = [{name: _seconds(act) for name, act in acts.items()} for _ in range(ROUNDS + 1)][1:]
    (slow, slow_slope), (fast, fast_slope) = step(plain, inputs), step(ours, inputs)
    torch.set_num_threads(threads)
    mb = {name: _peak(name) for name in STEPS}
    times = {
        clock: {
            "seconds": {name: _median(one[name][n] for one in rounds) for name in acts},
            "ours / plain": _median(one["ours"][n] / one["plain"][n] for one in rounds),
            "ours / floor": _median(one["ours"][n] / one["floor"][n] for one in rounds),
        }
        for n, clock in enumerate(("wall", "processor"))
    }
    return {
        **times,
        "MB": mb,
        "memory, ours / plain": round(mb["ours"] / mb["plain"], 4),
        "loss, relative difference": float(f"{abs(slow - fast) / abs(slow):.1e}"),
        "gradient, relative difference": float(f"{(slow_slope - fast_slope).norm() / slow_slope.norm():.1e}"),
    }


def plain(t: Tensor, teacher_bank: Tensor, s: Tensor, student_bank: Tensor) -> Tensor:
    """The loss as the CompRess release computes it."""
    logits = [
        (bank.clone() @ l2_normalize(x).T).T.div(TAU).contiguous() for bank, x in ((teacher_bank, t), (student_bank, s))
    ]
    return torch.nn.functional.kl_div(logits[1].log_softmax(1), logits[0].softmax(1), reduction="batchmean")


def ours(t: Tensor, teacher_bank: Tensor, s: Tensor, student_bank: Tensor) -> Tensor:
    return relation_kl(t, teacher_bank, s, student_bank, TAU, TAU)


STEPS = {"plain": plain, "ours": ours}


def made(k: int = K) -> list[Tensor]:
    """Teacher rows and bank, student rows and bank; written in place, so that the peak before a step is their size."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.empty(n, width).normal_(generator=generator) for width in (D, d) for n in (B, k)]
    for bank in parts[1::2]:
        for block in bank.split(4096):
            block.div_(block.norm(dim=1, keepdim=True))
    return parts


def step(loss: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, Tensor]:
    """Loss and its gradient in the student's rows."""
    t, teacher_bank, s, student_bank = inputs
    s = s.clone().requires_grad_()
    value = loss(t, teacher_bank, s, student_bank)
    value.backward()
    assert s.grad is not None
    return float(value.detach()), s.grad


def products(inputs: list[Tensor]) -> Callable[[], None]:
    """The four matrix products over the whole bank, alone."""
    t, teacher_bank, s, student_bank = inputs
    similarity, weights, pull = torch.empty(K, B), torch.rand(2 * B, K), torch.empty(2 * B, d)

    def act() -> None:
        torch.mm(teacher_bank, t.T, out=similarity)
        torch.mm(student_bank, s.T, out=similarity)
        torch.mm(weights, student_bank, out=pull)  # both pulls at once

    return act


def _seconds(act: Callable[[], object]) -> tuple[float, float]:
    """(seconds of wall-clock time, processor seconds of all threads)"""
    began = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def _median(numbers: Iterable[float]) -> float:
    return round(statistics.median(numbers), 3)


def _peak(name: str) -> float:
    """Resident megabytes at the peak of one step above its inputs, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    command = [sys.executable, "-m", "benchmarks.similarity", name]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


def main(name: str) -> None:
    torch.set_num_threads(THREADS)
    step(STEPS[name], made(256))  # what any first step costs: libraries, their own buffers
    inputs = made()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here; ru_maxrss would start from our parent's
    before = resident("VmRSS")
    step(STEPS[name], inputs)
    print(json.dumps(round(resident("VmHWM") - before, 1)))


def resident(field: str) -> float:
    """Megabytes of this process, now (VmRSS) or at the peak (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main(sys.argv[1])
