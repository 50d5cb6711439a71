"""O-DICE against the authors' released update, step by step."""

from __future__ import annotations

import pytest
import torch

from rlkit2.agents.odice import ODICE
from rlkit2.data import Batch
from tests.reference import ReferenceUpdates, odice_files

FILES = odice_files()
TRACES = {
    "value/grad_norm": "v_grad_norm",
    "policy/grad_norm": "policy_grad_norm",
    "policy/loss": "policy_loss",
    "value/dual_forward": "dual_loss_forward",
    "value/dual_backward": "dual_loss_backward",
    "value/mean_term": "v_mean_loss_term",
    "projection/forward_norm": "g_forward_norm",
    "projection/backward_norm": "g_backward_norm",
    "projection/dot": "g_dot",
    "projection/perpendicular_norm": "g_perp_norm",
    "projection/coefficient": "parallel_coef",
    "projection/cosine": "cos_forward_backward",
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, *, parameter: bool = False) -> None:
    """The tolerances that belong to the vectors: every seed of `actual` against the one of the file."""
    expected = expected.to(actual.dtype)
    if actual.dtype == torch.float64:
        rtol, atol = 1e-9, 1e-12
    else:
        rtol, atol = (0.0, 5e-6) if parameter else (1e-4, 1e-5)
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("seeds", [1, 2, 3])
@pytest.mark.parametrize("name", FILES)
def test_updates_equal_the_released_code(name: str, seeds: int) -> None:
    """Residuals, weights, gradients, traces and parameters of every seed equal the file's, step by step."""
    file = ReferenceUpdates(name)
    follow(file, file.agent(seeds))


def follow(file: ReferenceUpdates, agent: ODICE) -> None:
    """Train `agent` on the file's batches and compare everything the file knows."""
    seeds = len(agent.seeds)
    for t in range(file.steps):
        batch = file.batch(t, seeds)
        terms = agent.terms(batch)
        assert_close(terms.residual_forward, file.trace("residual_forward", t), f"R_f at {t}")
        assert_close(terms.weight_raw, file.trace("weight_raw", t), f"raw weight at {t}")
        assert_close(terms.weight, file.trace("weight", t), f"weight at {t}")
        assert (terms.residual_backward is None) == (file.meta["rule"] != "orthogonal")
        if terms.residual_backward is not None:
            assert_close(terms.residual_backward, file.trace("residual_backward", t), f"R_b at {t}")
        if t == 0:
            check_first_gradients(file, agent, batch)
        metrics = agent.update(batch)
        for key, trace in TRACES.items():
            assert (key in metrics) == (f"trace/{trace}" in file.arrays), key
            if key in metrics:
                assert_close(metrics[key], torch.as_tensor(file.arrays[f"trace/{trace}"][t]), f"{key} at {t}")
        if "projection/cosine_after" in metrics:
            assert metrics["projection/cosine_after"].abs().max() < (1e-12 if file.dtype == torch.float64 else 1e-5)
        if (t + 1) in file.meta["snaps"]:
            check_parameters(file, agent, t + 1)


def check_parameters(file: ReferenceUpdates, agent: ODICE, step: int, seed: slice = slice(None)) -> None:
    """The parameters of V, its target and the policy after `step` updates."""
    where = f"step{step:02d}"
    expected = {**file.value(f"{where}/v"), **file.value(f"{where}/v_target", "value_target"), **file.policy(where)}
    state = agent.state_dict()
    for key, tensor in expected.items():
        assert_close(state[key][seed], tensor, f"{key} after {step}", parameter=True)


def check_first_gradients(file: ReferenceUpdates, agent: ODICE, batch: Batch) -> None:
    gradients = agent.value_gradients(batch)
    assert_close(
        file.flatten_value(gradients.total), torch.from_numpy(file.arrays["step01/grad/v_total"]), "total gradient"
    )
    if gradients.backward is not None:
        assert_close(
            file.flatten_value(gradients.forward),
            torch.from_numpy(file.arrays["step01/grad/forward"]),
            "forward gradient",
        )
        assert_close(
            file.flatten_value(gradients.backward),
            torch.from_numpy(file.arrays["step01/grad/backward"]),
            "backward gradient",
        )
    summed = [a + b for a, b in zip(gradients.forward, gradients.value_term, strict=True)]
    if gradients.backward is None:
        for part, total in zip(summed, gradients.total, strict=True):
            torch.testing.assert_close(part, total)
    weight = agent.terms(batch).weight.mean(1)
    loss = -(weight * agent.actor.log_prob(batch.observations, batch.actions)).mean(1).sum()
    grads = torch.autograd.grad(loss, [agent.actor.log_std, agent.actor.network.flat])
    views = agent.actor.network.named_views(grads[1]).values()
    flat = torch.cat([grads[0].flatten(1), *(view.mT.flatten(1) for view in views)], 1)
    assert_close(flat, torch.from_numpy(file.arrays["step01/grad/policy_total"]), "policy gradient")


def test_a_neighbour_with_other_parameters_changes_nothing() -> None:
    """Seed 0 follows the file while seed 1 starts elsewhere and trains on other data."""
    file = ReferenceUpdates("odice_orthogonal_pearson_twin_s1")
    foreign_file = ReferenceUpdates("odice_orthogonal_pearson_twin_edge_clamps")
    agent = file.agent(2)
    state = agent.state_dict()
    generator = torch.Generator().manual_seed(0)
    for key, tensor in state.items():
        if key.startswith(("value", "policy")):
            tensor[1] += torch.randn(tensor[1].shape, generator=generator, dtype=tensor.dtype)
    agent.load_state_dict(state)
    for t in range(file.steps):
        own, foreign = file.batch(t), foreign_file.batch((t + 7) % file.steps)
        metrics = agent.update(
            Batch(**{key: torch.cat([getattr(own, key), getattr(foreign, key)]) for key in vars(own)})
        )
        assert_close(metrics["projection/coefficient"][:1], torch.as_tensor(file.arrays["trace/parallel_coef"][t]), "c")
    check_parameters(file, agent, file.steps, slice(0, 1))


def test_files_are_there() -> None:
    """The copies cover every rule, divergence, head count and setting, the float32 file and the edge cases."""
    names = " ".join(FILES)
    for word in (
        "orthogonal",
        "semi",
        "true",
        "pearson",
        "rkl",
        "twin",
        "single",
        "s1",
        "s2",
        "float32",
        "zerograd",
        "zeroforward",
        "clamps",
    ):
        assert word in names
