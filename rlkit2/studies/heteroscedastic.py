"""Do the losses recover noise that depends on the input? Regression with known generalized-Gaussian noise.

    x ~ U(-1, 1),   y = sin 3x + (0.05 + 0.6 x^2) e,   e ~ GGD(b) of unit variance,   1000 samples, an MLP of 64-64

with and without inverse-variance weights, and the linear counterpart for these: they help a stiff model and not a flexible one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from rlkit2.agents.error_model import ErrorModel, ErrorOptions, Heads
from rlkit2.losses.ggd import batch_inverse_variance, effective_sample_size, inverse_variance_weights
from rlkit2.nn import Adam, StackedMLP
from rlkit2.nn.distributions import GeneralizedNormal

Array = NDArray[np.float64]

SHAPES = (0.7, 1.0, 2.0)
METHODS: dict[str, ErrorOptions] = {
    "squared error": ErrorOptions(),
    "Gaussian": ErrorOptions(critic="gaussian", coupling="ggd"),
    "GGD, coupled": ErrorOptions(critic="ggd", coupling="ggd"),
    "GGD, decoupled": ErrorOptions(critic="ggd"),
    "GGD, coupled, scale 1": ErrorOptions(critic="ggd", coupling="ggd", critic_scale="fixed"),
    "official form": ErrorOptions(critic="ggd", coupling="ggd", critic_scale="fixed", critic_form="official"),
}
WEIGHTED = {f"squared error, weighted, ESS {share:.0%}": share for share in (0.8, 0.5, 0.25)}
"""Squared error with weights 1 / (true variance + xi), xi such that the effective sample size is at least this share of the batch."""
LEVELS = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


@dataclass(frozen=True)
class RegressionResult:
    """One method under noise of one shape, per seed; NaN where squared error says nothing."""

    noise_shape: float
    method: str
    rmse: Array  # of the conditional mean, on a grid
    nll: Array  # on fresh samples, with log 2
    calibration_error: Array  # mean |share - level| over central intervals, on the same
    sd_ratio: Array  # median over the grid of predicted to true deviation
    sd_rank: Array  # Spearman correlation of predicted and true deviation
    shape: Array  # median learnt shape

    def row(self) -> dict[str, Any]:
        """Means over seeds."""
        names = ("rmse", "nll", "calibration_error", "sd_ratio", "sd_rank", "shape")
        return {
            "noise shape": self.noise_shape,
            "method": self.method,
            **{name: float(getattr(self, name).mean()) for name in names},
        }


def true_sd(x: Tensor) -> Tensor:
    """Deviation of the noise at x."""
    return 0.05 + 0.6 * x.square()


def _draw(shape: float, seeds: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """x and y, `[seeds, count]`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = 2.0 * torch.rand(seeds, count, dtype=torch.float64) - 1.0
        density = GeneralizedNormal(0.0, 1.0, shape)
        noise = density.sample((seeds, count)) / density.stddev
    return x, torch.sin(3.0 * x) + true_sd(x) * noise


def run_regression(
    methods: Sequence[str] = (*METHODS, *WEIGHTED),
    shapes: Sequence[float] = SHAPES,
    *,
    seeds: int = 4,
    steps: int = 3000,
    batch: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> list[RegressionResult]:
    """Every method under every noise, `seeds` fits each; noises and seeds train side by side.

    Args:
        methods: names in `METHODS` and `WEIGHTED`.
        shapes: of the noise.
        steps, batch: of Adam at 1e-3, falling to 0 along half a cosine.
        progress: called with (done, all).
    """
    data = [_draw(shape, seeds, 1000, 10 + i) for i, shape in enumerate(shapes)]
    fresh = [_draw(shape, seeds, 4000, 90 + i) for i, shape in enumerate(shapes)]
    x, y, new_x, new_y = (torch.cat([pair[i] for pair in pairs]) for pairs in (data, fresh) for i in (0, 1))
    results = []
    for done, method in enumerate(methods):
        heads, grid, new = _fit(x, y, new_x, METHODS.get(method, ErrorOptions()), steps, batch, WEIGHTED.get(method))
        for i, shape in enumerate(shapes):
            rows = slice(i * seeds, (i + 1) * seeds)
            results.append(_judge(shape, method, _rows(heads, rows), grid, _rows(new, rows), new_y[rows]))
        if progress is not None:
            progress(done + 1, len(methods))
    return results


def _rows(heads: Heads, rows: slice) -> Heads:
    return Heads(*(part[rows, 0].double() for part in (heads.q, heads.shape, heads.log_scale)))


def _fit(
    x: Tensor, y: Tensor, new_x: Tensor, options: ErrorOptions, steps: int, batch: int, share: float | None = None
) -> tuple[Heads, Tensor, Heads]:
    count = len(x)
    model = ErrorModel(options, count, torch.float32, torch.device("cpu"))
    network = StackedMLP(
        1,
        (64, 64),
        1 + model.outputs,
        seeds=range(count),
        members=1,
        detached_outputs=model.outputs if model.detached else 0,
    )
    optimizer = Adam(network, 1e-3, cosine_steps=steps)
    inputs, targets = x.float().unsqueeze(-1), y.float()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(x.shape[1], (batch,), generator=generator)
        outputs = network(inputs[:, index])
        if share is None:
            loss, _ = model.loss(outputs, targets[:, index], 0.0)
        else:
            weights = inverse_variance_weights(true_sd(x[:, index]).square(), share * batch).float()
            loss = ((outputs[:, 0, :, 0] - targets[:, index]).square() * weights).mean(1)
        optimizer.minimize(loss)

    def heads(at: Tensor) -> Heads:
        with torch.no_grad():
            outputs = network(at.float().unsqueeze(-1))
            if model.outputs:
                return model.heads(outputs)
        q = outputs[..., 0]
        return Heads(q, torch.full_like(q, torch.nan), torch.full_like(q, torch.nan))

    grid = torch.linspace(-1.0, 1.0, 201, dtype=torch.float64)
    return heads(grid.expand(count, -1)), grid, heads(new_x)


def _judge(shape: float, method: str, found: Heads, grid: Tensor, new: Heads, new_y: Tensor) -> RegressionResult:
    truth = true_sd(grid)
    rmse = (found.q - torch.sin(3.0 * grid)).square().mean(1).sqrt()
    nothing = np.full(len(rmse), np.nan)
    if method.startswith("squared error"):
        return RegressionResult(shape, method, rmse.numpy(), *([nothing] * 5))
    density = GeneralizedNormal(new.q, new.log_scale.exp(), new.shape, validate_args=False)
    central = (2.0 * density.cdf(new_y) - 1.0).abs()
    shares = (central.unsqueeze(-1) <= LEVELS).double().mean(1)
    sd = found.variance.sqrt()
    return RegressionResult(
        noise_shape=shape,
        method=method,
        rmse=rmse.numpy(),
        nll=-density.log_prob(new_y).mean(1).numpy(),
        calibration_error=(shares - LEVELS).abs().mean(1).numpy(),
        sd_ratio=(sd / truth).median(1).values.numpy(),
        sd_rank=np.array([_spearman(row, truth) for row in sd]),
        shape=found.shape.median(1).values.numpy(),
    )


def _spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([t.argsort().argsort().double() for t in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def regression_figure(results: Sequence[RegressionResult]) -> Figure:
    """Negative log-likelihood, calibration error and ratio of deviations, by shape of the noise."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    rows = [result.row() for result in results if not result.method.startswith("squared error")]
    panels = figure.subplots(1, 3)
    for axes, name in zip(panels, ("nll", "calibration_error", "sd_ratio"), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            axes.plot([row["noise shape"] for row in own], [row[name] for row in own], marker="o", label=method)
        axes.set(xlabel="shape of the noise", ylabel=name.replace("_", " "))
        axes.grid(alpha=0.25)
    panels[2].axhline(1.0, color="0.6", linewidth=1)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def run_weighting(seeds: int = 200, *, seed: int = 0) -> list[dict[str, float]]:
    """Least squares with 20 linear features, 300 samples, half of them ten times as noisy (GGD(0.7), deviations 0.3 and 3).

    Returns the error of the fitted function by what is added to the known variances: none at all, then xi = 0, 1, 5.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = torch.randn(seeds, 300, 20, dtype=torch.float64)
        truth = torch.randn(seeds, 20, 1, dtype=torch.float64) / 20**0.5
        density = GeneralizedNormal(0.0, 1.0, 0.7)
        sd = torch.where(torch.arange(300) < 150, 3.0, 0.3).double().expand(seeds, -1)
        noise = sd * density.sample((seeds, 300)) / density.stddev
    y = features @ truth + noise.unsqueeze(-1)
    rows = []
    for xi in (None, 0.0, 1.0, 5.0):
        weights = torch.ones_like(sd) if xi is None else batch_inverse_variance(sd.square(), xi)
        root = weights.sqrt().unsqueeze(-1)
        fitted = torch.linalg.lstsq(root * features, root * y).solution
        error = (fitted - truth).square().mean((1, 2)).sqrt().mean()
        share = effective_sample_size(weights).mean() / 300
        rows.append({"xi": float("inf") if xi is None else xi, "error": float(error), "ESS/B": float(share)})
    return rows
