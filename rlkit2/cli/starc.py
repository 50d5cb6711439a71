"""`rlkit2 starc ...`: distances between rewards, exact in finite processes, with intervals from data, and the regret study."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction

from rlkit2.api import load_dataset, load_policy
from rlkit2.cli.output import console, print_json, say
from rlkit2.cli.parsing import AS_IS, HowToRead, subcommand
from rlkit2.data import TransitionDataset
from rlkit2.data.infos import read_infos
from rlkit2.data.relabel import load_reward
from rlkit2.data.reward_calls import reads_infos
from rlkit2.errors import ConfigError, RewardError
from rlkit2.fields import show_fields
from rlkit2.files import make_folder, save_figure, write_atomically
from rlkit2.preferences.reward_ensemble import RewardEnsemble
from rlkit2.progress import progress_bar
from rlkit2.rewards import (
    RewardDistanceMatrix,
    SampledStarc,
    TabularMDP,
    regret,
    regret_bound,
    starc_matrix,
    worst_case_regret,
)
from rlkit2.rewards.canonical import Canonicalization
from rlkit2.rewards.norms import NormName
from rlkit2.rewards.npz import read_tabular
from rlkit2.rewards.sampled.collecting import collect
from rlkit2.rewards.sampled.features import FeatureName
from rlkit2.rewards.sampled.grams import Estimator
from rlkit2.studies.starc_study import StudyConfig, run_study


def tabular(
    file: Positional[Path | None] = None,
    *,
    env: str | None = None,
    discount: float | None = None,
    reward: tuple[str, ...] = (),
    true: str | None = None,
    canonicalization: Canonicalization = "val",
    norm: NormName = "l2",
    distance: NormName = "l2",
    restrict_to_reachable: bool = False,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Exact distances between rewards in a finite process, and what they say about regret.

    Example: rlkit2 starc tabular --env FrozenLake-v1

    Args:
        file: .npz file with transitions [S, A, S], discount, and rewards [K, S, A, S] with names [K] (or each reward under its own name).
        env: environment with a table of transitions (FrozenLake-v1, CliffWalking-v1, Taxi-v4) or small and deterministic, by its id or as
            my_envs.py:NAME or module:NAME of what makes it, instead of a file. Its reward is compared with variants of it, or with those of --reward.
        discount: in [0, 1); default: the file's, or 0.99 for an environment.
        reward: further rewards, [NAME=]file.py:FUNCTION of index arrays (states, actions, next_states) giving numbers of the same shape, or
            [NAME=]file.npy of shape [S, A, S], [S, A] or [S].
        true: name of the reward that regret is measured under; default: the first.
        canonicalization: val, minimal, val_potential, minimal_potential, epic, dard, srrd or none.
        norm: what the canonical rewards are divided by; range (with distance range) bounds the regret in every process.
        distance: the norm of the difference.
        restrict_to_reachable: leave out states that no policy reaches from the start.
        out: folder for distances.json, distances.csv and pictures (SVG).
        json: print JSON.
    """
    if (file is None) == (env is None):
        raise ConfigError("give either a file or --env, for example: rlkit2 starc tabular --env FrozenLake-v1")
    if file is not None:
        mdp, rewards = read_tabular(file, discount)
    else:
        mdp, own = TabularMDP.from_gym(env, 0.99 if discount is None else discount)
        rewards = {"environment": own} if reward else variants(mdp, own)
    for text in reward:
        name, path = _named(text)
        rewards[_free(name, rewards)] = _table_reward(path, mdp)
    _at_least_two(rewards)
    matrix = starc_matrix(
        rewards,
        mdp,
        canonicalization=canonicalization,
        norm=norm,
        distance=distance,
        restrict_to_reachable=restrict_to_reachable,
    )
    truth = next(iter(rewards)) if true is None else true
    if truth not in rewards:
        raise ConfigError(f"--true {truth!r} is not one of the rewards: {', '.join(rewards)}")
    losses = _regrets(truth, rewards, mdp)
    saved = _save(matrix, out)
    if json:
        print_json({**matrix.to_dict(), "mdp": repr(mdp), "true": truth, "regret": losses, "files": saved})
        return 0
    say(repr(mdp))
    _print(matrix)
    _print_regrets(truth, losses)
    _say_saved(saved)
    return 0


def variants(mdp: TabularMDP, reward: Any) -> dict[str, Any]:
    """The reward of an environment, two that order policies alike, two that look alike and do not, and its opposite.

    The potential is the state's index. In an absorbing state, shaping is `(discount - 1) Phi`; leaving it out, as a shaping that is
    computed from recorded episodes does, changes what the episode's end is worth.
    """
    potential = np.arange(mdp.num_states) / mdp.num_states
    shaping = mdp.discount * potential[None, None, :] - potential[:, None, None]
    absorbing = np.isclose(np.einsum("sas->sa", mdp.dense.numpy()), 1).all(1)
    forgotten = np.where(absorbing[:, None, None], 0.0, reward + shaping)
    cost = np.where(absorbing[:, None, None], 0.0, reward - 0.01)
    mean = mdp.expected_reward(reward).numpy()
    return {
        "environment": reward,
        "shaped": reward + shaping,
        "mean over next states": mean,
        "shaped, ends forgotten": forgotten,
        "step cost": cost,
        "negated": -reward,
    }


@dataclass(frozen=True)
class EstimateOptions:
    """How distances are estimated from transitions, and where they go."""

    # in [0, 1), one for all rewards
    discount: float = 0.99
    # what values and advantages are fitted in
    features: FeatureName = "auto"
    # crossfit, or another to see what it gives
    estimator: Estimator = "crossfit"
    # folds of episodes
    folds: int = 5
    # resamplings of episodes for the 95 % intervals; 0: none
    bootstrap: int = 200
    # penalty of the fits; above 0 the distance is no longer exactly invariant to shaping
    ridge: float = 0.0
    # l2, or l1 (with estimator plugin)
    norm: Literal["l1", "l2"] = "l2"
    # of folds, features and resampling (and of episodes and actions in a simulator)
    seed: int = 0
    # folder for distances.json, distances.csv and pictures (SVG)
    out: Path | None = None
    # print JSON
    json: bool = False


@show_fields(EstimateOptions, bare=True)
def dataset(
    dataset: Positional[str],
    *,
    reading: HowToRead = AS_IS,
    reward: tuple[str, ...] = (),
    true: bool = False,
    **options: Any,
) -> int:
    """Distances between rewards on the transitions of a dataset, with intervals.

    Example: rlkit2 starc dataset builtin/pendulum --reward rewards.py:upright --reward rewards.py:still --true

    Args:
        dataset: Minari id, built-in id (builtin/...), or a file or folder in a known format.
        reading: how to read it.
        reward: rewards to compare, each [NAME=]file.py:OBJECT or package.module:OBJECT, a function or torch module of observations, actions,
            next_observations, terminations and infos or some of them, n rows each, giving n numbers, or a reward network; a file (.npy, .npz,
            .safetensors) of one number per transition; or the folder of a reward model (of each of its seeds).
        true: also compare with the dataset's own reward.
        **options: those of the estimate.
    """
    given = EstimateOptions(**options)
    starc, rewards = _estimator(given), _rewards(reward, true)
    data = load_dataset(dataset, **reading.arguments())
    infos = read_infos(dataset) if any(reads_infos(part) for part in rewards.values()) else None
    with progress_bar("transitions") as progress:
        matrix = starc.fit(data, rewards, infos=infos, progress=progress)
    return _report(matrix, data, given)


@show_fields(EstimateOptions, bare=True)
def env(
    env: Positional[str],
    *,
    reward: tuple[str, ...] = (),
    true: bool = False,
    policy: tuple[str, ...] = (),
    episodes: int = 100,
    max_steps: int | None = None,
    **options: Any,
) -> int:
    """Distances between rewards on episodes that a coverage policy plays in a simulator, with intervals.

    Example: rlkit2 starc env Pendulum-v1 --reward rewards.py:upright --true --policy uniform

    Args:
        env: Gymnasium id, or my_envs.py:NAME or module:NAME of a function or class that makes one.
        reward: as of `starc dataset`.
        true: also compare with the environment's own reward.
        policy: what plays: uniform (the default), or the folder of a run or saved policy (all seeds of it); several make a mixture of which one
            is drawn for each step, [WEIGHT=]POLICY: --policy 0.3=uniform --policy 0.7=runs/iql-001. Its advantages are compared.
        episodes: how many.
        max_steps: cut episodes there.
        **options: those of the estimate.
    """
    given = EstimateOptions(**options)
    starc, rewards = _estimator(given), _rewards(reward, true)
    mixture = [_weighted(text) for text in policy or ("uniform",)]
    with progress_bar("episodes") as progress:
        data, infos = collect(
            env, policy=mixture, episodes=episodes, max_steps=max_steps, seed=given.seed, progress=progress
        )
    with progress_bar("transitions") as progress:
        matrix = starc.fit(data, rewards, infos=infos, progress=progress)
    return _report(matrix, data, given)


def _estimator(given: EstimateOptions) -> SampledStarc:
    return SampledStarc(**{name: value for name, value in vars(given).items() if name not in ("out", "json")})


def _rewards(texts: Sequence[str], true: bool) -> dict[str, Any]:
    """The rewards asked for by name; `true` is that of the data."""
    rewards: dict[str, Any] = {"true": "recorded"} if true else {}
    for text in texts:
        name, path = _named(text)
        if not Path(path).is_dir():
            rewards[_free(name, rewards)] = load_reward(path)[0]
            continue
        model = RewardEnsemble.load(path)
        for index, seed in enumerate(model.seeds):
            label = name if len(model.seeds) == 1 else f"{name} seed {seed}"
            rewards[_free(label, rewards)] = model.select_seed(index)
    _at_least_two(rewards)
    return rewards


def _weighted(text: str) -> tuple[float, Any]:
    """`[WEIGHT=]POLICY` as a part of a mixture."""
    weight, equals, place = text.rpartition("=")
    try:
        share = float(weight) if equals else 1.0
    except ValueError:
        share, place = 1.0, text
    if place == "uniform":
        return share, place
    return share, load_policy(place)


def _report(matrix: RewardDistanceMatrix, data: TransitionDataset, given: EstimateOptions) -> int:
    saved = _save(matrix, given.out)
    if given.json:
        print_json(
            {**matrix.to_dict(), "dataset": data.spec.id, "content_hash": data.spec.content_hash, "files": saved}
        )
        return 0
    found = matrix.diagnostics
    say(
        f"{data.spec.id}: {found['transitions']:,} transitions in {found['episodes']:,} episodes, discount {given.discount:g}"
    )
    _print(matrix)
    _print_diagnostics(matrix)
    _say_saved(saved)
    return 0


def study(
    *,
    out: Path = Path("starc-study"),
    mdps: int = 384,
    pairs: int = 8,
    steps: int = 16,
    states: int = 32,
    actions: int = 4,
    discount: float = 0.95,
    metrics: Literal["standard", "all"] = "standard",
    workers: int | None = None,
    seed: int = 0,
    rows: int = 43,
    json: bool = False,
) -> int:
    """Which distance predicts regret: the published study with exact values, in parallel.

    Example: rlkit2 starc study --mdps 384 --out starc-study

    Args:
        out: folder for table.csv, distance_and_regret.svg and the comparisons; a study that was stopped is resumed there.
        mdps: random processes.
        pairs: pairs of random rewards in each.
        steps: rewards on the way from one to the other.
        states: states of a process.
        actions: actions in each state.
        discount: in [0, 1).
        metrics: standard (43) or all (237, about five times the time).
        workers: processes that work in parallel; default: one per core.
        seed: of processes and rewards; the result does not depend on the number of workers.
        rows: metrics printed, best first.
        json: print JSON.
    """
    config = StudyConfig(mdps, pairs, steps, states, actions, discount, seed, metrics)
    with progress_bar("processes") as progress:
        result = run_study(config, out, workers=workers or os.cpu_count() or 1, progress=progress)
    found = result.rows()
    used, everything = (len(result.usable(trivial=kind).regret) for kind in (False, True))
    if json:
        print_json({"settings": asdict(config), "comparisons": everything, "without_trivial": used, "metrics": found})
        return 0
    table = Table(
        title=f"correlation with regret over {used:,} comparisons (without trivial rewards)", title_justify="left"
    )
    for column in (
        "metric",
        "r (95 % interval)",
        "Spearman",
        "r, all rewards",
        "exact reference",
        "same, all",
        "published",
    ):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for row in found[:rows]:
        numbers = (
            row["spearman"],
            row["with_trivial"],
            row.get("exact_nontrivial"),
            row.get("exact_all"),
            row.get("published"),
        )
        cells = ("" if x is None or math.isnan(x) else f"{x:.3f}" for x in numbers)
        table.add_row(row["metric"], f"{row['correlation']:.3f} ({row['low']:.3f} to {row['high']:.3f})", *cells)
    console().print(table)
    say(
        "the published values hold noise of trivial rewards and of sampled returns; the exact ones are those to compare with"
    )
    _say_saved([str(out / name) for name in ("table.csv", "distance_and_regret.svg")])
    return 0


def _named(text: str) -> tuple[str, str]:
    """`NAME=WHERE`, or a name made of where the reward comes from."""
    name, equals, place = text.partition("=")
    if equals:
        return name, place
    _, colon, function = text.rpartition(":")
    return (function if colon else Path(text).stem), text


def _free(name: str, taken: dict[str, Any]) -> str:
    if name in taken:
        raise ConfigError(f"two rewards are called {name!r}; name them apart: --reward other={name}.py:FUNCTION")
    return name


def _at_least_two(rewards: dict[str, Any]) -> None:
    if len(rewards) < 2:
        raise ConfigError(
            f"a distance needs two rewards, not {len(rewards)}; add --reward file.py:FUNCTION (or --true for a dataset's own)"
        )


def _table_reward(path: str, mdp: TabularMDP) -> Any:
    values, _ = load_reward(path)
    if callable(values):
        states, actions = mdp.num_states, mdp.num_actions
        values = np.asarray(values(*np.indices((states, actions, states))), dtype=np.float64)
    return values


def _regrets(truth: str, rewards: dict[str, Any], mdp: TabularMDP) -> dict[str, dict[str, Any]]:
    """What optimising each other reward can cost under the true one; empty where the true reward is trivial."""
    found = {}
    for name, reward in rewards.items():
        if name == truth:
            continue
        try:
            bound = regret_bound(rewards[truth], reward, mdp)
        except RewardError:
            return {}
        found[name] = {
            "regret": regret(rewards[truth], reward, mdp),
            "worst_case_regret": worst_case_regret(rewards[truth], reward, mdp),
            "bound": bound.upper,
            "certificate": str(bound),
        }
    return found


def _print(matrix: RewardDistanceMatrix) -> None:
    table = Table(title=matrix.settings["label"], title_justify="left")
    table.add_column("")
    for name in matrix.names:
        table.add_column(name, justify="right")
    for i, name in enumerate(matrix.names):
        status = matrix.status(i)
        table.add_row(f"{name} ({status})" if status else name, *(_cell(matrix, i, j) for j in range(len(matrix))))
    console().print(table)
    for note in matrix.notes:
        say(f"note: {note}")


def _cell(matrix: RewardDistanceMatrix, i: int, j: int) -> str:
    if math.isnan(matrix.values[i, j]):
        return "n/a"
    if matrix.ci is None or i == j:
        return f"{matrix.values[i, j]:.4f}" if matrix.ci is None else f"{matrix.values[i, j]:.3f}"
    low, high = matrix.ci[i, j]
    return f"{matrix.values[i, j]:.3f} ({low:.3f} to {high:.3f})"


def _print_regrets(truth: str, losses: dict[str, dict[str, Any]]) -> None:
    if not losses:
        say(f"{truth} is trivial: all policies have the same return under it, there is nothing to lose")
        return
    table = Table(title=f"what is lost under {truth!r}, as a share of the range of its returns", title_justify="left")
    for column in ("optimising", "regret of its optimum", "worst case", "range/range bound"):
        table.add_column(column, justify="left" if column == "optimising" else "right")
    for name, row in losses.items():
        cells = (row["regret"], row["worst_case_regret"], row["bound"])
        table.add_row(name, *("n/a" if math.isnan(x) else f"{x:.4f}" for x in cells))
    console().print(table)
    for name, row in losses.items():
        say(f"{name}: {row['certificate']}")


def _print_diagnostics(matrix: RewardDistanceMatrix) -> None:
    found = matrix.diagnostics
    say(
        f"{found['features']}: {found['state_features']} for values, {found['pair_features']} for advantages; "
        f"{100 * found['terminated_share']:.2f} % of the steps terminate, {100 * found['truncated_share']:.2f} % are cut off"
    )
    say(
        f"effective episodes {found['effective_episodes']:.0f}; coverage {100 * found['coverage']:.0f} %; "
        f"invariance gap {found['invariance_gap']:.1e}"
    )
    numbers = found["held_out_r2"], found["bellman_residual"], found["misfit"].values()
    for name, share, residual, missed in zip(matrix.names, *numbers, strict=True):
        say(
            f"{name}: advantage explains {100 * share:.1f} % of held-out TD errors, Bellman residual {residual:.3f}, misfit {missed:.2f}"
        )


def _save(matrix: RewardDistanceMatrix, out: Path | None) -> list[str]:
    if out is None:
        return []
    make_folder(out)
    write_atomically(out / "distances.json", matrix.to_json())
    write_atomically(out / "distances.csv", matrix.to_csv())
    paths = [out / "distances.json", out / "distances.csv"]
    for name in ("heatmap", "dendrogram", "mds"):
        try:
            figure = getattr(matrix, name)().figure
        except RewardError:
            continue  # fewer than two rewards have numbers
        paths.append(save_figure(figure, out / f"{name}.svg"))
    return [str(path) for path in paths]


def _say_saved(saved: list[str]) -> None:
    if saved:
        say(f"wrote {', '.join(saved)}")


SUBCOMMANDS: dict[str, Callable[..., int]] = {
    "tabular": tabular,
    "dataset": dataset,
    "env": env,
    "study": study,
}


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return subcommand("starc", SUBCOMMANDS, arguments, config=(FlagCreatePairsOff, UseAppendAction))
