"""Learning-rate curves from what the gradients of an earlier run were like.

For the last iterate of a method whose steps are weighted by w_t, the best learning rate is

    eta_t  ~  w_t  sum_(p > t) w_p,

which is a falling line where gradients are always of one size (w constant), rises at first where they shrink, and falls fast at the end where they
grow. With Adam w_t = 1 / |g_t|_1; a run logs the Euclidean norms of its gradients, which stand for them here: in proportion, as long as the shape
of a gradient does not change.

Source: Defazio, Cutkosky, Mehta and Mishchenko, "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement" (arXiv 2310.07831),
section 3, whose median over a tenth of the run this is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlkit2.errors import ConfigError
from rlkit2.training.run import Run

WIDTH = 0.1  # of the run, for the median
POINTS = 101  # of a curve
FEWEST = 20  # log lines that a curve can be made from
NORM = "/grad_norm"


def refined_curve(steps: ArrayLike, norms: ArrayLike) -> NDArray[np.float64]:
    """The learning rate at `POINTS` equal distances of a run, from its begin to its end, as a share of the largest.

    Args:
        steps: rising, `[T]`; a norm is that of the updates since the step before.
        norms: of gradients, positive, `[T]`.
    """
    ends, found = np.asarray(steps, np.float64), np.asarray(norms, np.float64)
    # updates of one log line are alike: its weight counts once for each of them
    middles = (np.concatenate([[0.0], ends[:-1]]) + ends) / 2
    at = (np.arange(1000) + 0.5) / 1000 * ends[-1]
    weights = 1.0 / _medians(np.interp(at, middles, found))
    after = np.cumsum(weights[::-1])[::-1] - weights
    rates = np.append(weights * after, 0.0)
    curve = np.interp(np.linspace(0.0, 1.0, POINTS), np.append((np.arange(1000) + 0.5) / 1000, 1.0), rates)
    shares: NDArray[np.float64] = curve / curve.max()
    return shares


def _medians(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Running medians; what comes after the end is mirrored, the first value stands for what came before it."""
    half = int(WIDTH * len(norms)) // 2
    padded = np.concatenate([np.full(half, norms[0]), norms, norms[-2 : -half - 2 : -1]])
    found: NDArray[np.float64] = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)
    return found


def refined_curves(run: Run, agent: str) -> dict[str, list[float]]:
    """The curves of all networks whose gradients the run has logged, mean over its seeds: part of the agent -> `POINTS` shares.

    Raises:
        ConfigError: it is a run of another agent, acted, or has logged too little.
    """
    if run.config["agent"] != agent:
        raise ConfigError(f"{run.path} trains {run.config['agent']}, and its gradients say nothing of {agent}'s")
    if "online" in run.config:
        raise ConfigError(
            f"{run.path} learns in an environment; the learning rates of a run that learns from data need one that does, too"
        )
    lines = run.metrics()
    parts = sorted({name.removesuffix(NORM) for line in lines for name in line if name.endswith(NORM)})
    found = {part: _norms(lines, f"{part}{NORM}") for part in parts}
    known = {part: norms for part, norms in found.items() if len(norms) >= FEWEST}
    if not known:
        raise ConfigError(
            f"{run.path} has fewer than {FEWEST} log lines with norms of gradients, too few for a curve; train it for longer, or with a smaller "
            "--log-every"
        )
    return {part: refined_curve(list(norms), list(norms.values())).round(6).tolist() for part, norms in known.items()}


def _norms(lines: list[dict[str, Any]], name: str) -> Mapping[int, float]:
    """Step -> mean over seeds of a norm, where it is a positive number for all that have one."""
    values: dict[int, list[float]] = {}
    for line in lines:
        if line.get(name) is not None:
            values.setdefault(line["step"], []).append(float(line[name]))
    means = {step: float(np.mean(own)) for step, own in sorted(values.items())}
    return {step: mean for step, mean in means.items() if np.isfinite(mean) and mean > 0.0}
