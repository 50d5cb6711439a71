"""oneDNN multiplies only where it is exact, pays and nobody has chosen otherwise."""

from __future__ import annotations

import pytest
import torch

from rlkit2.nn import fast_matmul, matmul
from rlkit2.nn.matmul import SMALLEST_WORK

CPU = torch.device("cpu")


@pytest.fixture
def suitable(monkeypatch):
    """A processor as the choice wants it, whatever this one is."""
    monkeypatch.setattr(matmul, "onednn_is_better", lambda: True)


def test_large_work_changes_the_library_inside_the_block_only(suitable):
    with fast_matmul(CPU, SMALLEST_WORK) as active:
        assert active
        assert torch.get_float32_matmul_precision() == "medium"
        with fast_matmul(CPU, SMALLEST_WORK) as again:
            assert not again
            assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ZeroDivisionError), fast_matmul(CPU, SMALLEST_WORK):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("device", "work"), [("cpu", SMALLEST_WORK - 1), ("cuda", SMALLEST_WORK), ("meta", 2**40)])
def test_small_work_and_other_devices_are_left_alone(suitable, device, work):
    with fast_matmul(torch.device(device), work) as active:
        assert not active
        assert torch.get_float32_matmul_precision() == "highest"


def test_a_precision_that_somebody_has_chosen_stays(suitable):
    torch.set_float32_matmul_precision("high")
    try:
        with fast_matmul(CPU, SMALLEST_WORK) as active:
            assert not active
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_process_with_torchs_other_interface_is_left_alone(suitable, monkeypatch):
    def refuse():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    with fast_matmul(CPU, SMALLEST_WORK) as active:
        assert not active


def rounded(mask: int):
    """Products of factors that keep the leading bits only, summed in float32."""

    def multiply(left, right):
        left, right = ((factor.contiguous().view(torch.int32) & mask).view(torch.float32) for factor in (left, right))
        return left @ right

    return multiply


@pytest.mark.parametrize("mask", [~0xFFFF, ~0x1FFF], ids=["bfloat16", "tf32"])
def test_lower_precision_is_noticed(mask):
    assert matmul.is_float32(torch.matmul)
    assert not matmul.is_float32(rounded(mask))


def test_inside_the_block_products_are_float32():
    """On this machine, whichever library it takes."""
    with fast_matmul(CPU, SMALLEST_WORK):
        assert matmul.is_float32(torch.matmul)


@pytest.mark.parametrize("reason", ["capability", "maker", "precision"])
def test_every_condition_counts(monkeypatch, reason):
    monkeypatch.setattr(
        torch.backends.cpu, "get_cpu_capability", lambda: "AVX2" if reason == "capability" else "AVX512"
    )
    monkeypatch.setattr(matmul, "_is_amd", lambda: reason != "maker")
    monkeypatch.setattr(matmul, "is_float32", lambda multiply: reason != "precision")
    decide = matmul.onednn_is_better.__wrapped__
    assert not decide()
    for name, good in (("_is_amd", lambda: True), ("is_float32", lambda multiply: True)):
        monkeypatch.setattr(matmul, name, good)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert decide()
