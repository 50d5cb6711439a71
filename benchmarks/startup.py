"""`import rlkit2` against `import torch`, each in a fresh process.

.venv/bin/python benchmarks/startup.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from common import interleaved, report

GATE = 1.5  # times `import torch`


def main() -> None:
    """Measure and print; the ratio is that of the medians, since every round is a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    options = parser.parse_args()
    statements = {"torch": "import torch", "rlkit2": "import rlkit2", "load_dataset": "from rlkit2 import load_dataset"}
    cases = {
        name: (lambda code=code: subprocess.run([sys.executable, "-c", code], check=True))
        for name, code in statements.items()
    }
    times = {name: statistics.median(values) for name, values in interleaved(cases, options.rounds).items()}
    rows = [
        {"what": "import rlkit2 / import torch (at most)", "ratio": times["rlkit2"] / times["torch"], "gate": GATE},
        {"what": "from rlkit2 import load_dataset / import torch", "ratio": times["load_dataset"] / times["torch"]},
    ]
    report("startup", [{**row, **times} for row in rows], rounds=options.rounds)


if __name__ == "__main__":
    main()
