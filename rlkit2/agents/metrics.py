"""What an update reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

Derived = Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]]
"""Functions of the made metrics, element by element: they serve `[S]` of one update and `[n, S]` of many."""


class Metrics(Mapping[str, Tensor]):
    """Metrics `group/name` of one update, `[S]` each: some made by the update, some derived from those when somebody reads them.

    A ratio of numbers that are logged anyway need not be computed in every update; the trainer derives it for all updates of an interval at once.

    Args:
        made: what the update has computed.
        derived: what follows from it.
    """

    def __init__(self, made: Mapping[str, Tensor], derived: Derived) -> None:
        self.made, self.derived = made, derived

    def __getitem__(self, name: str) -> Tensor:
        return self.made[name] if name in self.made else self.derived[name](self.made)

    def __iter__(self) -> Iterator[str]:
        yield from self.made
        yield from self.derived

    def __len__(self) -> int:
        return len(self.made) + len(self.derived)
