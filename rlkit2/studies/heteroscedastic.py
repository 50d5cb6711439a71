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
from torch import Tensor, nn

from rlkit2.agents.error_model import SMOOTHING, ErrorModel, ErrorOptions, Heads
from rlkit2.losses.ggd import batch_inverse_variance, effective_sample_size, ggd_nll, inverse_variance_weights
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


SHAPE_CASES = {"same scale": None, "same deviation": 1.0, "louder with lighter tails": (0.3, 3.0)}
"""Deviations of the noise by half: None for what a scale of 1 gives, one number for both, or those of GGD(0.5) and GGD(4)."""


def run_shape_weighting(seeds: int = 20, *, seed: int = 0, steps: int = 400) -> list[dict[str, Any]]:
    """Weights between samples, by the shape of their noise or by its variance: 20 linear features, 300 samples, half GGD(0.5) and half GGD(4).

    Shapes and scales are known, so the weights alone are judged. Every weighting is tried on the squared error and on the negative log-likelihood;
    "shape" is beta over its mean, the "risk-averse" weight of Kim et al.; between the members of one sample it is, for a single member, the constant
    1 of "none".

    Returns:
        The error of the fitted function by case, loss and weight.
    """
    rows: list[dict[str, Any]] = []
    shape = torch.where(torch.arange(300) < 150, 0.5, 4.0).double().expand(seeds, -1)
    unit = GeneralizedNormal(torch.zeros(300).double(), torch.ones(300).double(), shape[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = torch.randn(seeds, 300, 20, dtype=torch.float64)
        truth = torch.randn(seeds, 20, 1, dtype=torch.float64) / 20**0.5
        noise = unit.sample((seeds,))
    for case, deviation in SHAPE_CASES.items():
        wanted = unit.stddev if deviation is None else torch.tensor(deviation).double()
        wanted = wanted if wanted.ndim == 0 or len(wanted) != 2 else wanted.repeat_interleave(150)
        scale = (wanted / unit.stddev).expand(seeds, -1)
        y = features @ truth + (scale * noise).unsqueeze(-1)
        weights = {
            "none": torch.ones_like(scale),
            "shape": batch_inverse_variance(shape.reciprocal()),
            "inverse variance": batch_inverse_variance((scale * unit.stddev).square()),
        }
        for name, weight in weights.items():
            root = weight.sqrt().unsqueeze(-1)
            squares = torch.linalg.lstsq(root * features, root * y).solution
            likely = _likeliest(features, y, shape, scale, weight, squares, steps)
            for loss, fitted in (("squared error", squares), ("likelihood", likely)):
                error = (fitted - truth).square().mean((1, 2)).sqrt()
                share = float(effective_sample_size(weight).mean() / 300)
                rows.append({"noise": case, "loss": loss, "weight": name, "error": float(error.mean()), "ESS/B": share})
    return sorted(rows, key=lambda row: (list(SHAPE_CASES).index(row["noise"]), row["loss"]))


def _likeliest(
    features: Tensor, y: Tensor, shape: Tensor, scale: Tensor, weight: Tensor, start: Tensor, steps: int
) -> Tensor:
    """Coefficients `[seeds, 20, 1]` of the greatest weighted likelihood near `start`."""
    holder = nn.Module()
    holder.fitted = nn.Parameter(start.clone())
    optimizer = Adam(holder, 0.02, cosine_steps=steps)
    for _ in range(steps):
        values = (features @ holder.fitted).squeeze(-1)
        each = ggd_nll(values, y.squeeze(-1), shape=shape, log_scale=scale.log(), reduction="none", smoothing=SMOOTHING)
        optimizer.minimize((weight * each).mean(1))
    return holder.fitted.detach()
