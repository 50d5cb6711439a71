"""The oldest versions that `pyproject.toml` allows, as constraints for pip; `make test-oldest` installs and tests them.

torch stays at the version of `constraints.txt`: older ones are gigabytes each, and its own bound is for those who have one installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def oldest() -> list[str]:
    """`name==version` for every dependency of the core; of those that `constraints.txt` names, what it says."""
    tested = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = {
        found[1]: found[2]
        for found in (re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)", text) for text in needed)
        if found
    }
    if len(bounds) != len(needed):
        raise ValueError(f"a dependency of pyproject.toml has no lower bound: {needed}")
    return [f"{name}=={tested.get(name, version)}" for name, version in bounds.items()]


if __name__ == "__main__":
    sys.stdout.write("\n".join(oldest()) + "\n")
