"""Types, ranges and meanings of fields: one check for every configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit2.errors import ConfigError
from rlkit2.fields import Checked, Count, Finite, Interval, Rate, Widths, describe_fields, read_fields


@dataclass(frozen=True)
class Example(Checked):
    """One field of every sort."""

    # above
    count: Count = 1
    rate: Rate = 0.5  # behind
    # above
    # in two lines
    finite: Finite = 0.0
    kind: Literal["one", "two"] = "one"
    widths: Widths = (8, 8)
    maybe: Annotated[float, Interval("[0, 1)")] | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    switch: bool = False


@given(
    st.sampled_from(["[]", "[)", "(]", "()"]),
    st.floats(-1e6, 1e6),
    st.floats(0.0, 1e6),
    st.floats(allow_nan=True, allow_infinity=True),
)
def test_an_interval_holds_what_mathematics_says(brackets: str, low: float, width: float, value: float) -> None:
    high = low + width
    interval = Interval(f"{brackets[0]}{low!r}, {high!r}{brackets[1]}")
    for x in (low, high, value):
        above = x >= low if brackets[0] == "[" else x > low
        below = x <= high if brackets[1] == "]" else x < high
        assert (x in interval) == (above and below)


@given(st.one_of(st.integers(), st.floats(), st.booleans(), st.text(), st.none(), st.lists(st.integers())), st.data())
def test_a_value_is_kept_or_refused_with_its_field_named(value: Any, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(list(Example.__dataclass_fields__)))
    try:
        kept = getattr(Example(**{field: value}), field)
    except ConfigError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith(f"{field} must be ")
        assert "\n" not in refusal
        return
    assert kept == (tuple(value) if isinstance(value, list) else value) or (field == "maybe" and kept is None)
    assert {
        "count": lambda v: type(v) is int and v >= 1,
        "rate": lambda v: type(v) is float and 0.0 < v <= 1.0,
        "finite": lambda v: type(v) is float and math.isfinite(v),
        "kind": lambda v: v in ("one", "two"),
        "widths": lambda v: all(type(w) is int and w >= 1 for w in v),
        "maybe": lambda v: v is None or 0.0 <= v < 1.0,
        "pair": lambda v: len(v) == 2 and all(type(x) is float for x in v),
        "switch": lambda v: type(v) is bool,
    }[field](kept)


def test_numbers_of_numpy_are_numbers() -> None:
    found = Example(count=np.int64(3), rate=np.float32(0.5), finite=np.int8(2), widths=(np.int32(4),))
    assert (found.count, found.rate, found.finite, found.widths) == (3, 0.5, 2.0, (4,))
    assert [type(v) for v in (found.count, found.rate, found.finite, found.widths[0])] == [int, float, float, int]


def test_meanings_are_the_comments_above_or_behind() -> None:
    assert [row[3] for row in describe_fields(Example)][:5] == ["above", "behind", "above in two lines", "", ""]
    kinds = {name: kind for name, kind, *_ in describe_fields(Example)}
    assert kinds["count"] == "a whole number of at least 1"
    assert kinds["rate"] == "a number in (0, 1]"
    assert kinds["finite"] == "a number that is finite"
    assert kinds["kind"] == "one of one, two"
    assert kinds["maybe"] == "a number in [0, 1) or none"


def test_an_unknown_field_is_answered_by_the_nearest() -> None:
    with pytest.raises(ConfigError, match="has no field 'counts'; did you mean count"):
        read_fields(Example, {"counts": 1})
