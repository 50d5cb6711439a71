"""What it costs to measure gradient entanglement, relative to a training step of the same pairs.

    .venv/bin/python benchmarks/entanglement.py                  # every method, widths 64 to 512, and the cost during training
    .venv/bin/python benchmarks/entanglement.py --widths 64      # a quick look
    .venv/bin/python benchmarks/entanglement.py --vocabulary 50257 128000 --rounds 3    # memory and time at large vocabularies

One DPO step of the pairs (policy forward and backward, reference forward, Adam) is the unit. All cases of a width take turns in one run, on one
thread, and are timed by the processor time they take.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import interleaved, ratio, report

from rlkit2.entanglement.probe import EntanglementProbe
from rlkit2.losses.margin import MarginInputs, margin_loss
from rlkit2.preferences.entanglement import PairBatch, causal_lm_logp, pair_geometry
from rlkit2.studies.toy_language import WORDS, SentimentGrammar, SmallGPT

METHODS = ("loop", "vmap", "ghost", "sketch", "head")


class Training:
    """A model of GPT-2's shape and one DPO step on a batch of pairs."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        model, frozen = SmallGPT(len(WORDS), width=width), SmallGPT(len(WORDS), width=width)
        frozen.load_state_dict(model.state_dict())
        self.score, self.frozen = causal_lm_logp(model), causal_lm_logp(frozen, parameters="all")
        self.optimizer = torch.optim.Adam(model.parameters(), 1e-5)

    def step(self, pairs: PairBatch, around: EntanglementProbe | None = None) -> dict[str, Any] | None:
        """One step; with a probe, measured around the optimiser's part as the callback does it."""
        with torch.no_grad():
            reference = self.frozen.sums(self.frozen.params, pairs.rows).chunk(2)
        sides = self.score.sums(self.score.params, pairs.rows).chunk(2)
        loss = margin_loss("dpo", MarginInputs(*sides, *reference)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        if around is not None:
            around.before()
        self.optimizer.step()
        return None if around is None else around.after()


def methods(width: int, pairs: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of every method on the same pairs, and their ratio to one training step."""
    training = Training(width)
    batch = SentimentGrammar(12, 0).pairs(pairs)
    cases: dict[str, Callable[[], Any]] = {"training step": partial(training.step, batch)}
    for method in METHODS:
        cases[method] = partial(pair_geometry, training.score, None, batch, method=method)
    seconds = interleaved(cases, rounds, clock=time.process_time)
    numbers = sum(p.numel() for p in training.score.params.values())
    return [
        {
            "width": width,
            "parameters": numbers,
            "method": name,
            "cpu_ms": 1000 * statistics.median(times),
            "training steps": ratio(times, seconds["training step"]),
            "faster than loop": ratio(seconds["loop"], times),
        }
        for name, times in seconds.items()
        if name != "training step"
    ]


def callback(every: int, pairs: int, records: int) -> dict[str, Any]:
    """Share of training time that measuring `pairs` pairs every `every` steps takes on the toy run (width 64, batch 32, 12 shared words)."""
    training, grammar = Training(64), SentimentGrammar(12, 1)
    probe = EntanglementProbe(training.score, SentimentGrammar(12, 2).pairs(pairs), "dpo", reference="initial")
    training.step(grammar.pairs(32), probe)
    plain, measured = [], []
    for step in range(1, every * records + 1):
        batch = grammar.pairs(32)
        around = probe if step % every == 0 else None
        start = time.process_time()
        training.step(batch, around)
        (plain if around is None else measured).append(time.process_time() - start)
    step_seconds = statistics.median(plain)
    extra = statistics.median(measured) - step_seconds
    return {
        "every": every,
        "pairs": pairs,
        "step_ms": 1000 * step_seconds,
        "measuring_ms": 1000 * extra,
        "share": extra / (every * step_seconds),
    }


def large_vocabulary(vocabulary: int, width: int, pairs: int, tokens: int, method: str) -> dict[str, float]:
    """Processor seconds of `pair_geometry` on random pairs (half prompt, half completion), and by how much the process grew at its largest (MB)."""
    torch.manual_seed(0)
    warm = causal_lm_logp(SmallGPT(len(WORDS)))
    pair_geometry(warm, None, SentimentGrammar(2, 0).pairs(2), method=method)
    score = causal_lm_logp(SmallGPT(vocabulary, width=width, positions=tokens))
    completion = (torch.arange(tokens) >= tokens // 2).long().expand(pairs, -1)
    sides = ({"input_ids": torch.randint(vocabulary, (pairs, tokens)), "completion_mask": completion} for _ in range(2))
    batch = PairBatch(*sides)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    start = time.process_time()
    pair_geometry(score, None, batch, method=method)
    seconds = time.process_time() - start
    return {"seconds": seconds, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before / 2**20}


def large(vocabulary: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """`large_vocabulary` of each method, in turn and each in a process of its own."""
    shape = ["--width", str(arguments.width), "--pairs", "4", "--tokens", "256"]
    found: dict[str, list[dict[str, float]]] = {method: [] for method in ("loop", "ghost")}
    for _ in range(arguments.rounds):
        for method, runs in found.items():
            command = [sys.executable, __file__, "--one", method, "--vocabulary", str(vocabulary), *shape]
            runs.append(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
    middle = {m: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for m, runs in found.items()}
    return [
        {"vocabulary": vocabulary, "width": arguments.width, "method": method, **numbers}
        | {f"{name} over loop": value / middle["loop"][name] for name, value in numbers.items()}
        for method, numbers in middle.items()
    ]


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--records", type=int, default=4, help="measured steps of the training run; 0 leaves it out")
    parser.add_argument(
        "--vocabulary", type=int, nargs="+", help="only loop and ghost at large vocabularies: 4 pairs of 256 tokens"
    )
    parser.add_argument("--width", type=int, default=64, help="of the model with a large vocabulary")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--one", choices=METHODS, help="one measurement at a large vocabulary, printed as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        case = (arguments.vocabulary[0], arguments.width, arguments.pairs, arguments.tokens, arguments.one)
        print(json.dumps(large_vocabulary(*case)))
        return
    if arguments.vocabulary:
        found = [row for size in arguments.vocabulary for row in large(size, arguments)]
        report("entanglement_vocabulary", found, rounds=arguments.rounds)
        return
    rows = [row for width in arguments.widths for row in methods(width, arguments.pairs, arguments.rounds)]
    during = callback(50, 8, arguments.records) if arguments.records else None
    report("entanglement", rows, pairs=arguments.pairs, rounds=arguments.rounds, during_training=during)
    if during:
        print(f"8 pairs every 50 steps of the toy run: {100 * during['share']:.2f} % of training time (gate: 5 %)")
    fastest = next((row for row in rows if (row["width"], row["method"]) == (64, "vmap")), None)
    if fastest:
        print(f"vmap at width 64: {fastest['faster than loop']:.2f} times faster than the loop (gate: 2.5)")


if __name__ == "__main__":
    main()
