"""Run folders written by hand."""

from __future__ import annotations

import json

import numpy as np

from rlkit2.training.run import Run

STEPS = (10, 20, 30)


def make_run(
    folder,
    agent="odice",
    dataset="zoo/hopper/medium-v0",
    *,
    level=50.0,
    seeds=(0, 1, 2, 3),
    episodes=6,
    normalized=True,
    **config,
):
    """A run folder whose scores rise to `level` at step 20 and fall by 10 at the end."""
    folder.mkdir(parents=True)
    content = {
        "agent": agent,
        "config": {"discount": 0.99, "gradient_rule": "orthogonal", **config},
        "dataset": {"id": dataset, "content_hash": f"hash of {dataset}", "source": dataset},
        "seeds": list(seeds),
        "data": {"normalize_observations": False},
        "training": {"steps": 30, "batch_size": 256, "eval_every": 10},
    }
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "manifest.json").write_text(
        json.dumps({"status": "finished", "versions": {"torch": "2"}, "command": "rlkit2 <train>"})
    )
    generator = np.random.default_rng(abs(hash((agent, level))) % 2**32)
    evaluations, metrics = [], []
    for step, height in zip(STEPS, (0.5 * level, level + 10, level), strict=True):
        for seed in seeds:
            scores = height + 0.5 * seed + generator.standard_normal(episodes)
            line = {
                "step": step,
                "seed": seed,
                "returns": (10 * scores).tolist(),
                "lengths": [5] * episodes,
                "deterministic": True,
            }
            evaluations.append({**line, "normalized_scores": scores.tolist() if normalized else None})
            metrics.append(
                {"step": step, "seed": seed, "loss/value": 1.0 / step, "projection/cosine": -0.1, "weight/zero": 0.3}
            )
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return Run(folder)
