"""Pictures of learned rewards and of the loop from preferences to regret."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.preferences import PreferenceDataset
from rlkit2.preferences.evaluation import BINS, RewardEvaluation, mean_rewards
from rlkit2.preferences.reward_ensemble import RewardEnsemble

MOST_POINTS = 2000


def reward_figure(
    model: RewardEnsemble,
    evaluation: RewardEvaluation,
    held_out: PreferenceDataset,
    dataset: TransitionDataset,
    true_rewards: ArrayLike,
) -> Figure:
    """Calibration, accuracy by true return gap, and predicted against true return of the held-out segments (a model of one seed)."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rows = held_out.rows(dataset)
    p = model.probabilities(dataset, *rows)[0].double().mean(0).numpy()
    y = held_out.label_mass.numpy()
    bins = np.minimum((BINS * p).astype(int), BINS - 1)
    full = [b for b in range(BINS) if (bins == b).any()]
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    left.scatter(
        [p[bins == b].mean() for b in full],
        [y[bins == b].mean() for b in full],
        s=[20 + 180 * (bins == b).mean() for b in full],
        alpha=0.8,
    )
    left.set(
        xlabel="predicted probability",
        ylabel="share that prefers the second",
        title=f"calibration, ECE {evaluation.ece:.3f}",
    )
    gaps = evaluation.accuracy_by_gap or []
    middle.bar(range(1, len(gaps) + 1), gaps, color="C1")
    middle.axhline(0.5, color="0.7", linewidth=1)
    middle.set(
        xlabel="quarter by true return gap (1: closest)",
        ylabel="accuracy",
        ylim=(0, 1.02),
        title=f"accuracy {evaluation.accuracy:.3f}",
        xticks=range(1, len(gaps) + 1),
    )
    segments = np.concatenate(rows)[:MOST_POINTS]
    predicted, true = (np.asarray(r, np.float64)[segments].sum(1) for r in (mean_rewards(model, dataset), true_rewards))
    right.scatter(true, predicted, s=6, alpha=0.4)
    rank = "n/a" if evaluation.segment_correlation is None else f"{evaluation.segment_correlation:.3f}"
    right.set(xlabel="true return of a segment", ylabel="predicted (free offset)", title=f"rank correlation {rank}")
    return figure


def study_figure(rows: Sequence[Mapping[str, Any]], correlations: Mapping[str, str], title: str) -> Figure:
    """Regret against STARC distance (with its interval) and against pair error, a point per teacher, budget and seed; baselines are crosses.

    Args:
        rows: of a study, see `rlkit2.studies.preferences_to_regret.StudyResult`.
        correlations: text for the titles under `starc` and `error`.
        title: of the figure.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    budgets = sorted({row["budget"] for row in rows if row["budget"]})
    for index, teacher in enumerate(teachers):
        for axes, measure in ((left, "starc"), (right, "error")):
            own = [row for row in rows if row["teacher"] == teacher and row["starc"] is not None]
            x = [row["starc"] if measure == "starc" else 1 - row["accuracy"] for row in own]
            baseline = bool(own) and not own[0]["budget"]
            axes.scatter(
                x,
                [row["regret"] for row in own],
                s=[60 if baseline else 18 + 60 * budgets.index(row["budget"]) / max(1, len(budgets)) for row in own],
                marker="x" if baseline else "o",
                color=f"C{index % 10}",
                alpha=0.75,
                label=teacher,
            )
            if measure == "starc":
                for row in own:
                    if row["starc_low"] is not None:
                        axes.plot(
                            [row["starc_low"], row["starc_high"]],
                            [row["regret"]] * 2,
                            color=f"C{index % 10}",
                            linewidth=0.6,
                            alpha=0.4,
                        )
    left.set(
        xlabel="STARC distance to the true reward", ylabel="regret (1: random policy)", title=correlations["starc"]
    )
    right.set(xlabel="error on held-out pairs", title=correlations["error"])
    for axes in (left, right):
        axes.grid(alpha=0.25)
    right.legend(frameon=False, fontsize=8, title="larger: more labels", title_fontsize=8)
    figure.suptitle(title)
    return figure
