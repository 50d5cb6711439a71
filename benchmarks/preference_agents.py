"""Agents that learn from preferences, beside IQL with the true reward and IQL with a reward of zero.

One set of oracle labels and one reward ensemble serve all training seeds, so the intervals speak about training alone.

    python benchmarks/preference_agents.py zoo/hopper/medium-replay-v0 --labels 500 --length 64 --seeds 4 --steps 50000 --out runs/preferences

Stop it at any time; the same command goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report
from scipy.stats import spearmanr

import rlkit2
from rlkit2.data.preferences import PreferenceDataset
from rlkit2.data.reward_file import save_rewards
from rlkit2.preferences import RewardEnsemble, ScriptedTeacher, collect_preferences, evaluate_reward, fit_reward_model
from rlkit2.preferences.relabelling import relabelled_rewards

METHODS: dict[str, dict[str, Any]] = {  # the part before the comma is the agent
    "iql, true reward": {},
    "iql, zero reward": {},
    "p_iql": {},
    "cpl": {},
    "cpl, cloning_weight 10": {"cloning_weight": 10.0},
    "ipl": {},
    "ipl, terminal_value -50": {"terminal_value": -50.0},
    "ipl, discount .97 and terminal_value -20": {
        "discount": 0.97,
        "terminal_value": -20.0,
        "inverse_temperature": 1.0,
    },
    "ipl, chi2 5 and rate 1e-4": {"chi2": 5.0, "learning_rate": 1e-4},
}


def main() -> None:
    """Label, fit, train what is not there yet, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--labels", type=int, default=500)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument(
        "--width", type=int, default=256, help="hidden units of every layer of agents and reward models"
    )
    parser.add_argument("--offset", default="min", help="of the learned reward: min, max, mean or none")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    dataset = rlkit2.load_dataset(given.dataset)
    fresh = collect_preferences(dataset, ScriptedTeacher(), 1000, length=given.length, seed=1)
    accuracy = prepare(given, dataset, fresh)
    rows = []
    for method in given.methods:
        run = trained(given, dataset, method)
        found = rlkit2.evaluate(run, episodes=given.episodes).summary()
        scores = found["normalized"] or found
        rows.append(
            {
                "method": method,
                "score": scores["mean"],
                "low": scores["interval"][0],
                "high": scores["interval"][1],
                "return": found["mean"],
                "seeds": len(run.config["seeds"]),
                "steps": run.manifest["step"],
                **(implied(run, dataset, fresh) if method.startswith("ipl") else {}),
            }
        )
    facts = {name: value for name, value in vars(given).items() if name not in ("out", "methods")}
    report("preference_agents", rows, settings=facts, reward_accuracy=accuracy)


def prepare(given: Any, dataset: Any, fresh: PreferenceDataset) -> float:
    """Labels and learned rewards under `out`; returns the accuracy of the reward on fresh oracle pairs."""
    if not (given.out / "labels" / "preferences.json").exists():
        labels = collect_preferences(dataset, ScriptedTeacher(), given.labels, length=given.length)
        labels.save(given.out / "labels")
    if not (given.out / "rewards.safetensors").exists():
        labels = PreferenceDataset.load(given.out / "labels")
        model = fit_reward_model(
            labels, dataset, hidden_sizes=(given.width,) * 2, steps=1000, learning_rate=1e-3, progress=print
        )
        model.save(given.out / "reward")
        values, facts = relabelled_rewards(dataset, model, normalise="std", offset=given.offset)
        save_rewards(given.out / "rewards.safetensors", dataset, values, facts)
    return evaluate_reward(RewardEnsemble.load(given.out / "reward"), fresh, dataset).accuracy


@torch.no_grad()
def implied(run: rlkit2.Run, dataset: Any, fresh: PreferenceDataset) -> dict[str, float]:
    """What the rewards that an IPL run implies are worth: accuracy on fresh pairs, rank correlation with the true ones; means over seeds."""
    agent = run.agent
    rows = torch.as_tensor(np.stack(fresh.rows(dataset)))  # [2, P, H]
    batch = dataset.gather(rows.flatten().expand(len(agent.seeds), -1))
    rewards = agent.rewards(agent.normalize(batch)).mean(1)
    first, second = rewards.view(-1, *rows.shape).sum(-1).unbind(1)
    wanted = (fresh.label_mass - 0.5).sign()
    right = ((second - first).sign() == wanted)[:, wanted != 0.0]
    truth = dataset.rewards[rows.flatten()]
    correlations = [float(spearmanr(own, truth).statistic) for own in rewards]
    return {"implied accuracy": float(right.double().mean()), "implied correlation": float(np.mean(correlations))}


def trained(given: Any, dataset: Any, method: str) -> rlkit2.Run:
    """The finished run of a method: found, resumed, or trained from the start."""
    agent = method.partition(",")[0]
    if method == "iql, zero reward":
        dataset = dataset.with_rewards(torch.zeros(len(dataset)))
    folder = given.out / method.replace(", ", "-").replace(" ", "-")
    runs = sorted(folder.glob("*/config.json"))
    if runs:
        run = rlkit2.load_run(runs[-1].parent)
        return run if run.manifest["status"] == "finished" else rlkit2.train(resume=run, dataset=dataset)
    own: dict[str, Any] = {
        "p_iql": {"rewards": str(given.out / "rewards.safetensors")},
        "cpl": {"preferences": str(given.out / "labels"), "bc_steps": given.steps * 2 // 5},
        "ipl": {"preferences": str(given.out / "labels")},
    }.get(agent, {})
    own |= METHODS[method]
    if agent.endswith("iql"):
        own["policy_cosine_steps"] = given.steps
    return rlkit2.train(
        agent,
        dataset,
        steps=given.steps,
        seeds=given.seeds,
        batch_size={"cpl": 32, "ipl": 8}.get(agent, 256),
        normalize_observations=True,
        reward_transform="return_range" if method == "iql, true reward" else "none",
        eval_every=0,
        device=given.device,
        out=folder,
        overrides={"hidden_sizes": (given.width,) * 2, **own},
    )


if __name__ == "__main__":
    main()
