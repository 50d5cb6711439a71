"""What O-DICE reports of an update: statistics of the batch, what follows from them, and signs of trouble."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlkit2.agents.metrics import Derived
from rlkit2.losses.divergences import f_conjugate, resolve_divergence
from rlkit2.nn import EncodedMLP, StackedMLP

if TYPE_CHECKING:
    from rlkit2.agents.odice import ODICEConfig, Residuals


def batch_statistics(
    config: ODICEConfig, rewards: Tensor, residuals: Residuals, clipped: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """Statistics of a batch before the step, `[S]` each, in few operations on small tensors.

    Args:
        config: of the agent.
        rewards: `[S, B]`.
        residuals: of the batch.
        clipped: its residuals as V's gradient uses them, `[1 or 2, S, M, B]`.
        weight: of the policy, `[S, M, B]`.
    """
    residual, value = residuals.forward, residuals.value
    lowest, highest = value.aminmax(dim=1, keepdim=True)
    duals = f_conjugate(config.divergence, clipped, alpha=config.alpha)
    samples = {  # [S, M, B] each, averaged together
        "value/mean": value,
        "residual/mean": residual,
        "weight/mean": weight.expand_as(value),
        "reward/mean": rewards.unsqueeze(1).expand_as(value),
        "value/head_gap": (highest - lowest).expand_as(value),
        "residual/conjugate_forward": duals[0],
        "weight/conjugate_mean": residuals.slopes[0],
        "weight/zero_share": (weight == 0.0).expand_as(value),
        "weight/mean_square": (weight * weight).expand_as(value),
    }
    if residuals.backward is not None:
        samples["residual/conjugate_backward"] = duals[1]
    if config.weight_clamp is not None:
        samples["weight/clamp_share"] = (weight == config.weight_clamp).expand_as(value)
    if config.residual_clip is not None:
        samples["residual/clip_share"] = residual > config.residual_clip
    stacked = torch.stack(list(samples.values())).flatten(2)
    metrics = dict(zip(samples, stacked.mean(2), strict=True))
    smallest, largest = stacked[:4].aminmax(dim=2)
    metrics["value/min"], metrics["residual/min"], _, metrics["reward/min"] = smallest
    metrics["value/max"], metrics["residual/max"], metrics["weight/max"], metrics["reward/max"] = largest
    return metrics


@torch.no_grad()
def coadaptation(
    network: StackedMLP | EncodedMLP, observations: Tensor, next_observations: Tensor
) -> dict[str, Tensor]:
    """How alike V sees the two states of a transition, beside two states of different transitions, `[S]` each, means over heads and batch.

    With phi the last hidden features: `product` <phi(s), phi(s')>, `cosine` its cosine, and `product_shuffled`, `cosine_shuffled` with the s' of
    another row. The paper's argument for the projection (section 3.2; after Kumar et al., "DR3", 2022) is about that product, pair by pair: an
    update that raises it forgets to tell s from s'. Two states of one transition are alike to begin with, so only the distance to the shuffled
    says whether features have grown together.

    Args:
        network: V, `[S, B, obs]` to `[S, M, B]`.
        observations, next_observations: `[S, B, obs]`, normalised.
    """
    here, there = (network.features(inputs) for inputs in (observations, next_observations))
    found = {}
    for name, other in (("", there), ("_shuffled", there.roll(1, -2))):
        product = torch.linalg.vecdot(here, other)
        norms = torch.linalg.vector_norm(here, dim=-1) * torch.linalg.vector_norm(other, dim=-1)
        found[f"coadaptation/product{name}"] = product.flatten(1).mean(1)
        found[f"coadaptation/cosine{name}"] = _cosine(product, norms).flatten(1).mean(1)
    return found


def signs_of_trouble(config: ODICEConfig, metrics: Mapping[str, float]) -> dict[str, str]:
    """Dead or saturated weights, the offset of `true`, overflow, an unsettled projection in one seed's metrics, each with its mend."""
    found = {}
    if metrics.get("weight/zero_share", 0.0) > 0.95:
        found["zero_weights"] = (
            "more than 95 % of the policy weights are zero; use weight = 'conjugate_grad', a smaller lambda_ or a larger residual_scale"
        )
    if metrics.get("weight/clamp_share", 0.0) > 0.5:
        found["clamped_weights"] = (
            "more than half of the policy weights are at the clamp; use weight_normalization = 'mean' or a smaller residual_scale"
        )
    mass = (1.0 - config.lambda_) / (config.lambda_ * max(1.0 - config.discount, 1e-12))
    if config.gradient_rule == "true" and mass > 20.0:
        found["true_offset"] = (
            f"gradient_rule = 'true' fixes the mean weight at {mass:.0f}; use lambda_ near {1.0 / (2.0 - config.discount):.3f}"
        )
    if resolve_divergence(config.divergence) == "rkl" and metrics.get("residual/max", 0.0) > 80.0:
        found["overflow"] = (
            "an rkl residual is above 80, near the overflow of exp in float32; set residual_clip or a smaller residual_scale"
        )
    if metrics.get("projection/coefficient", 0.0) < -2.0:
        found["projection"] = (
            "the projection coefficient is below -2 (about -1 once V settles): V runs ahead of its target; raise target_update_rate"
        )
    return found


def derived_metrics(config: ODICEConfig) -> Derived:
    """Metrics that follow from those which an update makes."""

    def dual(m: Mapping[str, Tensor], name: str, factor: float) -> Tensor:
        """A term of the scaled objective, (1/scale) f*(scale R), in units of V."""
        scale = m.get("temperature/residual_scale", config.residual_scale)
        return factor * m[name] / scale

    found: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
        "weight/effective_sample_share": lambda m: sample_share(m["weight/mean"], m["weight/mean_square"]),
        "value/mean_term": lambda m: (1.0 - config.lambda_) * m["value/mean"],
        "value/dual_forward": lambda m: dual(m, "residual/conjugate_forward", config.lambda_),
    }
    if config.discount < 1.0:  # what a return can be at least and at most by the rewards of the batch
        found["value/bound_min"] = lambda m: m["reward/min"] / (1.0 - config.discount)
        found["value/bound_max"] = lambda m: m["reward/max"] / (1.0 - config.discount)
    if config.gradient_rule != "orthogonal":
        return found
    found["value/dual_backward"] = lambda m: dual(m, "residual/conjugate_backward", config.lambda_ * config.eta)
    if config.projection == "sample":  # there are no gradients of the batch to compare
        return found

    def cosine(m: Mapping[str, Tensor]) -> Tensor:
        return _cosine(m["projection/dot"], m["projection/forward_norm"] * m["projection/backward_norm"])

    def cosine_after(m: Mapping[str, Tensor]) -> Tensor:
        return _cosine(
            m["value/dot_after_projection"], m["projection/forward_norm"] * m["projection/perpendicular_norm"]
        )

    def removed(m: Mapping[str, Tensor]) -> Tensor:
        return 1.0 - (m["projection/perpendicular_norm"] / m["projection/backward_norm"]).square().nan_to_num(1.0)

    return found | {
        "projection/cosine": cosine,
        "projection/cosine_after": cosine_after,
        "projection/removed_share": removed if config.projection == "layer" else lambda m: cosine(m).square(),
        "projection/flow_discount": lambda m: config.discount * config.eta / (1.0 - m["projection/coefficient"]),
        "projection/guard_active": lambda m: m["projection/forward_norm"].square() < config.projection_guard,
    }


def sample_share(mean: Tensor, mean_square: Tensor) -> Tensor:
    """Effective sample share (sum w)^2 / (n sum w^2) of n weights, `[S]`; 0 where all are zero."""
    share: Tensor = mean * mean / mean_square.clamp(min=torch.finfo(mean.dtype).tiny)
    return share


def _cosine(dot: Tensor, norms: Tensor) -> Tensor:
    """Cosine from an inner product and the product of the norms; 0 where a norm is 0."""
    return dot / norms.clamp(min=torch.finfo(norms.dtype).tiny)
