"""Arrays of every kind for the public functions of losses, rewards and statistics: `python -m tests.fuzz.arrays --count 20000`.

Each function has a plain call that works. One argument of it is then changed: another shape, another type, values that are not finite, huge, tiny or
subnormal, out of range, empty, a tensor with gradients, memory that is not contiguous. A call must end in a value or in an error that says what is
wrong (`ValueError`, `TypeError` or an error of rlkit2); it must leave its arguments alone, and give the same answer twice.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from rlkit2 import rewards
from rlkit2.evaluation import statistics
from rlkit2.losses import aggregation, divergences, ggd, margin, margin_table, preference, td
from rlkit2.rewards import TabularMDP

DISTANCES = (rewards.starc_distance, rewards.epic_distance, rewards.dard_distance, rewards.srrd_distance)
REFUSALS = (ValueError, TypeError)  # errors of rlkit2 about arguments are ValueErrors


@dataclass(frozen=True)
class Call:
    """A function and arguments with which it works."""

    name: str
    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]


def _tensor(*shape: int, low: float = -1.0, high: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def _mdp() -> TabularMDP:
    transitions = _tensor(3, 2, 3, low=0.1)
    return TabularMDP(transitions / transitions.sum(-1, keepdim=True), 0.9)


def _inputs() -> margin.MarginInputs:
    return margin.MarginInputs(_tensor(5, low=-9), _tensor(5, low=-9, seed=1))


def _scores(seed: int = 0) -> list[Any]:
    return [np.random.default_rng(seed).normal(size=(4, 6)) for _ in range(2)]


def _call(function: Callable[..., Any], **arguments: Any) -> Call:
    module = function.__module__.rpartition(".")[2]
    return Call(f"{module}.{function.__name__}", function, lambda: copy.deepcopy(arguments))


def calls() -> list[Call]:
    """A plain call of every public function that takes arrays."""
    x, y, positive = _tensor(2, 4, 5), _tensor(2, 4, 5, seed=1), _tensor(2, 4, 5, low=0.5, high=2.0)
    flags = _tensor(2, 5) > 0
    reward_a, reward_b, mdp = _tensor(3, 2, 3), _tensor(3, 2, 3, seed=1), _mdp()
    policy = torch.full((3, 2), 0.5, dtype=torch.float64)
    found = [
        _call(aggregation.lower_bound, values=x),
        _call(aggregation.grouped, values=x, groups=2),
        _call(aggregation.grouped_minimum, values=x),
        _call(aggregation.grouped_mean_minimum, values=x),
        _call(aggregation.shape_weighted_vote, values=x, shape=positive),
        _call(
            aggregation.member_advantages, rewards=_tensor(2, 3, 5), values=_tensor(2, 4, 3, 5), next_values=_tensor(2, 4, 3, 5),
            continues=_tensor(2, 3, 5) > 0, discount=0.9, trace=0.5,
        ),
        *(_call(f, name="pearson", residual=x) for f in (divergences.f_conjugate, divergences.f_conjugate_grad, divergences.policy_weight)),
        _call(divergences.f_value, name="pearson", weight=positive),
        _call(ggd.ggd_nll, values=x, targets=y, shape=positive),
        _call(ggd.gaussian_nll, values=x, targets=y, variance=positive),
        _call(ggd.shape_weights, shape=positive),
        _call(ggd.effective_sample_size, weights=positive),
        _call(ggd.batch_inverse_variance, variance=positive),
        _call(ggd.solve_xi, variance=positive, min_effective=2.0),
        _call(ggd.inverse_variance_weights, variance=positive, min_effective=2.0),
        _call(ggd.mbbe_variance, errors=x),
        _call(ggd.expected_minimum, count=3),
        _call(
            margin.length_desensitized_logp, token_logps=_tensor(5, 7, low=-3, high=0), mask=_tensor(5, 7) > 0,
            other_length=torch.full((5,), 3), ld_alpha=0.5,
        ),
        _call(margin_table.f_score, divergence="reverse_kl", ratio=_tensor(5, low=0.5, high=2)),
        _call(margin_table.alpha_reward, logp=_tensor(5, low=-3, high=0), alpha=0.5),
        _call(preference.bradley_terry_loss, return_w=_tensor(5), return_l=_tensor(5, seed=1)),
        _call(preference.segment_advantage, logp=_tensor(5, 4)),
        _call(preference.cpl_loss, logp_w=_tensor(5, 4), logp_l=_tensor(5, 4, seed=1)),
        _call(preference.cpl_rank_loss, advantages=_tensor(5, 3), scores=_tensor(5, 3, seed=1)),
        _call(preference.implicit_reward, q=_tensor(5, 4), next_value=_tensor(5, 4, seed=1), discount=0.9),
        _call(
            preference.ipl_loss, q_w=_tensor(5, 4), q_l=_tensor(5, 4, seed=1), next_value_w=_tensor(5, 4, seed=2),
            next_value_l=_tensor(5, 4, seed=3), discount=0.9,
        ),
        _call(td.td_target, rewards=_tensor(2, 5), terminations=flags, next_value=_tensor(2, 5), discount=0.9),
        _call(td.expectile_slope, difference=x, expectile=0.7),
        _call(td.expectile_loss, difference=x, expectile=0.7),
        _call(td.squared_error, values=x, targets=y),
        *(_call(f, reward_a=reward_a, reward_b=reward_b, mdp=mdp) for f in DISTANCES),
        _call(rewards.canonicalize, reward=reward_a, mdp=mdp, policy=policy),
        _call(rewards.starc_matrix, rewards=[reward_a, reward_b], mdp=mdp),
        _call(rewards.minimal_norm, reward=reward_a, mdp=mdp),
        _call(rewards.standardize, canonical=reward_a),
        _call(rewards.optimal_policy, reward=reward_a, mdp=mdp),
        _call(rewards.policy_return, policy=policy, reward=reward_a, mdp=mdp),
        _call(rewards.regret, true=reward_a, proxy=reward_b, mdp=mdp),
        _call(rewards.regret_bound, true=reward_a, proxy=reward_b, mdp=mdp),
        _call(rewards.worst_case_regret, true=reward_a, proxy=reward_b, mdp=mdp),
        _call(rewards.batched_starc_distance, reward_a=reward_a[None], reward_b=reward_b[None], transitions=mdp.transitions[None], discount=0.9),
        _call(TabularMDP, transitions=mdp.transitions, discount=0.9),
        _call(statistics.interquartile_mean, scores=_scores()[0]),
        _call(statistics.pooled_mean, tasks=_scores()),
        _call(statistics.pooled_iqm, tasks=_scores()),
        _call(statistics.checked, scores=_scores()[0]),
        _call(statistics.standard_errors, scores=_scores()[0]),
        _call(statistics.bootstrap, tasks=_scores(), resamples=50),
        _call(statistics.probability_of_improvement, tasks=_scores(), baseline=_scores(1), resamples=50),
    ]  # fmt: skip
    names = sorted(margin.MARGIN_LOSSES)
    return found + [Call(f"margin.margin_loss[{name}]", partial(_margin, name), _margin_arguments) for name in names]


def _margin_arguments() -> dict[str, Any]:
    sums = ("logp_chosen", "logp_rejected", "ref_chosen", "ref_rejected", "collision_chosen", "collision_rejected")
    found: dict[str, Any] = {name: _tensor(5, low=-9, high=-1, seed=k) for k, name in enumerate(sums)}
    return found | {
        "len_chosen": torch.arange(1, 6),
        "len_rejected": torch.arange(2, 7),
        "context_chosen": torch.ones(5),
    }


def _margin(name: str, **given: Any) -> Any:
    inputs = margin.MarginInputs(**given)
    return margin.margin_loss(name, inputs), margin.margin_coefficients(name, inputs)


SPECIAL = (float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 1e-310, 0.0, -0.0, -1.0, 1e38, 2.0**53 + 2)


def changed(value: Any, rng: random.Random) -> tuple[str, Any]:
    """Another value in the place of a good one, and what was done."""
    if isinstance(value, list) and value and rng.random() < 0.7:
        index = rng.randrange(len(value))
        what, other = changed(value[index], rng)
        return f"[{index}] {what}", [*value[:index], other, *value[index + 1 :]]
    if isinstance(value, torch.Tensor | np.ndarray):
        return rng.choice(ARRAYS)(value, rng)
    if isinstance(value, TabularMDP):
        return "an array for the process", value.transitions
    things = (None, "", "x", b"x", [], {}, object(), True, -1, 0, 1, 2**70, 0.5)
    others = (*things, *SPECIAL, np.zeros((0, 3)), torch.zeros(2, 2))
    other = rng.choice(others)
    return f"{other!r} instead", other


def _one_value(value: Any, rng: random.Random) -> tuple[str, Any]:
    special = rng.choice(SPECIAL)
    other = value.clone() if isinstance(value, torch.Tensor) else value.copy()
    if isinstance(other, torch.Tensor) and other.is_floating_point():
        other = other.double()
    flat = other.reshape(-1)
    if len(flat) == 0 or (isinstance(other, torch.Tensor) and not other.is_floating_point()):
        return "unchanged", other
    flat[rng.randrange(len(flat))] = special
    return f"a value {special}", other


def _all_values(value: Any, rng: random.Random) -> tuple[str, Any]:
    special = rng.choice(SPECIAL)
    if isinstance(value, torch.Tensor):
        return f"all values {special}", torch.full_like(value.double(), special)
    return f"all values {special}", np.full_like(value, special, dtype=float)


def _shape(value: Any, rng: random.Random) -> tuple[str, Any]:
    shapes: list[Callable[[Any], Any]] = [
        lambda v: v[:0], lambda v: v[:1], lambda v: v[None], lambda v: v.reshape(-1), lambda v: v.reshape(-1)[0], lambda v: v[..., :-1],
        lambda v: v[..., None], lambda v: v.T if v.ndim == 2 else v.swapaxes(0, -1), lambda v: v[..., :0],
    ]  # fmt: skip
    index = rng.randrange(len(shapes))
    other = shapes[index](value)
    return f"shape {tuple(other.shape)} for {tuple(value.shape)}", other


def _type(value: Any, rng: random.Random) -> tuple[str, Any]:
    if isinstance(value, np.ndarray):
        kind = rng.choice(
            ["float32", "int64", "bool", "complex128", "object", "U3", "float16", "uint8", "datetime64[s]"]
        )
        with np.errstate(all="ignore"):
            try:
                return kind, value.astype(kind)
            except (ValueError, TypeError):
                return "unchanged", value
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64]
    kind = rng.choice(kinds)
    return str(kind), value.to(kind)


def _form(value: Any, rng: random.Random) -> tuple[str, Any]:
    forms: list[Callable[[torch.Tensor], Any]] = [
        lambda v: v.tolist(), lambda v: v.numpy(), lambda v: v.double().requires_grad_(), lambda v: v.to("meta"), lambda v: v.to_sparse(),
        lambda v: torch.stack([v, v], -1)[..., 0], lambda v: v.expand(2, *v.shape)[0], lambda v: None,
    ]  # fmt: skip
    index = rng.randrange(len(forms))
    return f"form {index}", forms[index](
        value if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value))
    )


ARRAYS = (_one_value, _all_values, _shape, _type, _form)


def inputs(number: int, every: list[Call]) -> tuple[Call, str, dict[str, Any]]:
    """The call of that number: function, what was changed, arguments."""
    rng = random.Random(number)
    call = every[number % len(every)]
    arguments = call.arguments()
    name = rng.choice(sorted(arguments))
    what, arguments[name] = changed(arguments[name], rng)
    return call, f"{name}: {what}", arguments


def leaves(value: Any) -> Iterator[Any]:
    """The arrays and numbers in a result."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, Mapping):
        yield from leaves(list(value.values()))
    elif isinstance(value, torch.Tensor):
        yield (
            value.detach().to_dense().numpy().tobytes()
            if value.device.type == "cpu" and value.dtype != torch.bfloat16
            else str(value.shape)
        )
    elif isinstance(value, np.ndarray):
        yield str(value.tolist()) if value.dtype == object else value.tobytes()
    elif isinstance(value, float | int | str | None):
        yield repr(value)


def try_one(number: int, every: list[Call]) -> tuple[str, str]:
    """What the input was, and `answered`, `refused` or what is wrong."""
    call, what, arguments = inputs(number, every)
    what = f"{number}: {call.name} {what}"
    before = list(leaves(arguments))
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            first, second = call.function(**arguments), call.function(**arguments)
    except REFUSALS as error:
        return what, "refused" if str(error).strip() else f"an error without a word: {type(error).__name__}"
    except Exception:  # noqa: BLE001 - any other is a finding
        return what, traceback.format_exc()
    if list(leaves(arguments)) != before:
        return what, "the arguments were changed"
    return what, "answered" if list(leaves(first)) == list(leaves(second)) else "two answers to one question"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    every, found = calls(), Counter[str]()
    for number in range(options.first, options.first + options.count):
        what, came = try_one(number, every)
        found[came if came in ("answered", "refused") else "wrong"] += 1
        if came not in ("answered", "refused"):
            sys.stdout.write(f"{what}\n{came}\n")
    sys.stdout.write(f"{options.count} inputs for {len(every)} calls: {dict(found)}\n")
    return int(found["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
