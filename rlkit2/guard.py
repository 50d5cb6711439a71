"""One kind of error for what numpy or torch raise about the arguments of a public function."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from rlkit2.errors import ConfigError, RLKitError, first_line

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
FOREIGN = (RuntimeError, AttributeError, ArithmeticError, LookupError)


def guarded(
    kind: type[RLKitError] = ConfigError,
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorate a function of arrays: shapes, types and devices that do not fit end in an error of this kind that shows them in one line.

    Nothing is checked beforehand, so a call that works costs no more; memory that runs out is not their fault and stays what it is.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            try:
                return function(*args, **kwargs)
            except FOREIGN as error:
                if isinstance(error, RLKitError) or "memory" in str(error):
                    raise
                owner, _, _ = function.__qualname__.rpartition(".")  # of a method that makes an object
                owner = owner if not owner.endswith("<locals>") else ""
                given = [_shown(value) for value in args[bool(owner) :]]
                given += [f"{name} {_shown(value)}" for name, value in kwargs.items()]
                raise kind(f"{owner or function.__name__}({', '.join(given)}): {first_line(error)}") from error

        return call

    return decorate


def _shown(value: Any) -> str:
    """An array by its shape and type, anything else by its first letters."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return repr(value).replace("\n", " ")[:40]
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"
