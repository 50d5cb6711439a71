"""Arrays in, arrays out: numpy or torch, float32 or float64, and rewards of every shape brought to one."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkit2.errors import RewardError

Array: TypeAlias = NDArray[Any] | Tensor
Scalar: TypeAlias = float | Tensor


def to_tensor(values: Any, name: str) -> Tensor:
    """`values` as a tensor that shares their memory where it can; raises `RewardError` on anything that is not a real array."""
    if isinstance(values, Tensor):
        tensor = values
    else:
        try:
            array = np.asarray(values)
            if array.dtype.kind not in "biuf":
                raise TypeError(f"dtype {array.dtype}")
            tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"{name} is not an array of real numbers ({error}); give a numpy array or a torch tensor"
            ) from None
    if tensor.is_complex():
        raise RewardError(f"{name} is complex; give real numbers")
    return tensor


def to_float(values: Any, name: str, default: torch.dtype = torch.float64, *, finite: bool = True) -> Tensor:
    """`values` as a float32 or float64 tensor, found to be finite unless told not to look; integers, bools and half precision become `default`."""
    tensor = to_tensor(values, name)
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.to(default)
    # A sum is finite only where everything is; it overflows where the entries must be looked at.
    if finite and not math.isfinite(tensor.detach().sum()) and not bool(torch.isfinite(tensor).all()):
        index = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
        raise RewardError(f"{name}{index} is {tensor[tuple(index)]}; replace it by a finite number")
    return tensor


def sparse_matrix(values: Any) -> sp.csr_array | None:
    """`values` as a CSR matrix where they are a scipy sparse matrix or array, else None."""
    matrix: Any = values
    return sp.csr_array(matrix) if sp.issparse(values) else None


def power_of_two(sizes: Tensor) -> Tensor:
    """The powers of two at or below positive sizes, 1 for 0: dividing by them brings rewards to about 1 without rounding, so that no square of
    them overflows or vanishes."""
    exponents = torch.frexp(sizes)[1].to(sizes.dtype) - 1
    return torch.where(sizes > 0, torch.exp2(exponents), torch.ones_like(sizes))


def is_torch(*values: Any) -> bool:
    """Whether any of the values is a torch tensor: then the results are tensors too."""
    return any(isinstance(value, Tensor) for value in values)


def any_floating(*values: Any) -> bool:
    """Whether any of the values is a floating array."""
    return any("float" in _dtype_name(getattr(value, "dtype", "")) for value in values)


def result_dtype(*values: Any) -> torch.dtype:
    """The dtype results are given back in: the widest floating dtype among the values, float64 where none is floating."""
    kinds = {_dtype_name(getattr(value, "dtype", "")) for value in values}
    return torch.float32 if "float32" in kinds and "float64" not in kinds else torch.float64


@lru_cache(maxsize=64)  # NumPy takes as long to spell a dtype as to add up an array
def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def give_back(result: Tensor, *given: Any) -> Any:
    """`result` as the kind that was given: a tensor, or a numpy array (a Python float for a single number)."""
    if result.is_floating_point():
        result = result.to(result_dtype(*given))
    if is_torch(*given):
        device = next(value.device for value in given if isinstance(value, Tensor))
        return result.to(device)
    array = result.detach().cpu().numpy()
    return array.item() if array.ndim == 0 else array
