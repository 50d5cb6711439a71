"""Which library multiplies the float32 matrices of an update on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

SMALLEST_WORK = 2**23
"""Multiplications in the largest product from which on oneDNN pays (`benchmarks/matmul.py`): it takes longer to start one."""


@contextmanager
def fast_matmul(device: torch.device, work: int) -> Iterator[bool]:
    """Let oneDNN multiply inside the block where that is faster and as exact; yields whether it does.

    MKL, torch's default, leaves half of an AMD processor with AVX-512 unused; oneDNN, which torch carries too, does not. torch hands float32
    products to it under the precision "medium", which allows bfloat16 inside: on processors that would take it the default stays.
    The setting is one of the process; `work` and the machine alone decide, so a resumed run computes as before.

    Args:
        device: where the update runs; nothing changes on others than CPUs.
        work: multiplications of the largest product: weights of a layer (all seeds and members of a group) times rows of a minibatch.
    """
    if device.type != "cpu" or work < SMALLEST_WORK or not _is_default() or not onednn_is_better():
        yield False
        return
    with _precision("medium"):
        yield True


@functools.cache
def onednn_is_better() -> bool:
    """Whether this processor is one that MKL slows down and that oneDNN's "medium" products are exact float32 on."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not _is_amd():
        return False
    with _precision("medium"):
        return is_float32(torch.matmul)


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False


def _is_default() -> bool:
    """Whether nobody has set a precision in this process."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by torch's other interface: they exclude each other
        return False


def is_float32(multiply: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether products keep float32's precision.

    Over 256 terms it is within 1e-6 of the sum of their sizes; bfloat16 misses by 1e-3 (`benchmarks/matmul.py`), TF32 by more than 1e-4.

    Args:
        multiply: of float32 `[64, 256]` and `[256, 64]`.
    """
    left, right = torch.randn((2, 64, 256), generator=torch.Generator().manual_seed(0))
    exact, sizes = left.double() @ right.double().T, left.double().abs() @ right.double().abs().T
    return bool(((multiply(left, right.T) - exact).abs() < 1e-5 * sizes).all())


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
