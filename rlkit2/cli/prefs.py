"""`rlkit2 prefs ...`: label segments of a dataset, fit a reward to the labels, and run the whole loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from tyro.conf import OmitArgPrefixes, Positional

from rlkit2.api import load_dataset
from rlkit2.cli.output import console, print_json, say
from rlkit2.cli.parsing import AS_IS, HowToRead, name_values, subcommand
from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.environments import Env, make_environment
from rlkit2.data.preferences import PreferenceDataset
from rlkit2.data.reward_file import save_rewards
from rlkit2.errors import ConfigError, DatasetError
from rlkit2.evaluation.environments import evaluation_source
from rlkit2.files import save_figure
from rlkit2.preferences import (
    RewardEnsemble,
    ScriptedTeacher,
    SegmentArrays,
    baseline_rewards,
    collect_preferences,
    evaluate_reward,
    fit_reward_model,
    import_preference_transformer,
    relabel,
    starc_to_truth,
)
from rlkit2.preferences.evaluation import mean_rewards
from rlkit2.preferences.options import FitOptions, RelabelOptions
from rlkit2.preferences.relabelling import relabelled_rewards
from rlkit2.progress import progress_bar

if TYPE_CHECKING:
    from rlkit2.studies.preferences_to_regret import StudyResult

REWARDS = "rewards.safetensors"


def label(
    dataset: Positional[str],
    *,
    reading: HowToRead = AS_IS,
    out: Path,
    teacher: str = "oracle",
    count: int = 500,
    length: int = 50,
    stride: int = 1,
    sampler: str = "uniform",
    model: Path | None = None,
    beta: float | None = None,
    beta_scale: str = "none",
    equal_threshold: float | None = None,
    skip_threshold: float | None = None,
    seed: int = 0,
    serve: bool = False,
    port: int = 0,
    open_browser: bool = True,
    people: Path | None = None,
    label_key: str | None = None,
    as_dataset: bool = False,
    more: bool = False,
    env: str | None = None,
    trust_env: bool = False,
) -> int:
    """Label pairs of segments, by a scripted teacher or by hand in the browser.

    Example: rlkit2 prefs label builtin/rooms --teacher oracle --count 500 --length 8 --out labels

    Args:
        dataset: Minari id, builtin/... id, or a file or folder in a known format.
        reading: how to read it.
        out: folder of the labels; with --serve, labels that are there are kept and added to.
        teacher: oracle, mistake, noisy, myopic, skip or equal.
        count: pairs to label.
        length: steps of a segment.
        stride: steps between the starts of neighbouring segments.
        sampler: uniform, episodes, k_center, or with --model disagreement, entropy or mean_variance.
        model: folder of a reward model, for the samplers that ask one.
        beta: inverse temperature of the teacher; default: that of the teacher.
        beta_scale: std divides score differences by their deviation, so that --beta does not depend on the reward's scale.
        equal_threshold: returns that differ by less are equally good (in units of reward); sparse rewards need one.
        skip_threshold: skip pairs whose better return is at most this (in units of reward).
        seed: of pairs, noise and mistakes.
        serve: show the pairs in the browser and let a person answer.
        port: of the page, on this computer only; 0: any free one.
        open_browser: open the page in a browser.
        people: import labels: a folder in the layout of the Preference Transformer files, or an .npz file of labelled segments (CPL, IPL, D4RL
            preference batches), which are looked up in the dataset.
        label_key: the array of labels or scores in that .npz file.
        as_dataset: the segments of the .npz file become the dataset DATASET, a new Minari id, as they are in no other one.
        more: add to the labels in --out instead of refusing to replace them.
        env: with --serve: environment that draws the pairs: an id, my_envs.py:NAME or module:NAME of what makes one (asked for
            render_mode="rgb_array"); default: the dataset's.
        trust_env: with --serve: build the environment that draws the pairs as the dataset says, which runs the code it names.
    """
    if env is not None and not serve:
        raise ConfigError("--env is for drawing the pairs: give --serve, too")
    arrays = SegmentArrays.read(people, label_key=label_key) if people is not None and people.suffix == ".npz" else None
    if arrays is None and (label_key is not None or as_dataset):
        raise ConfigError(
            "--label-key and --as-dataset are for an .npz file of labelled segments; give --people FILE.npz"
        )
    exists = (out / "preferences.json").exists()
    if exists and not more and not serve:
        raise DatasetError(f"{out} holds labels already; name another folder, or add to them with --more")
    made = _write_segments(arrays, dataset) if arrays is not None and as_dataset else None
    data = load_dataset(dataset, **reading.arguments())
    ensemble = None if model is None else RewardEnsemble.load(model)
    if serve:
        from rlkit2.preferences.labelling import serve_labelling

        serve_labelling(
            data,
            out,
            count=count,
            length=length,
            stride=stride,
            sampler=sampler,
            model=ensemble,
            seed=seed,
            port=port,
            open_browser=open_browser,
            say=say,
            make_environment=_environment_maker(data, env, trust_env),
        )
        return 0
    if made is not None:
        labels = made.bind(data)
    elif arrays is not None:
        labels = arrays.find(data)
    elif people is not None:
        labels = import_preference_transformer(people, data, length=length)
    else:
        asked = ScriptedTeacher(
            teacher,
            beta=beta,
            beta_scale=beta_scale,
            equal_threshold=equal_threshold,
            skip_threshold=skip_threshold,
        )
        labels = collect_preferences(
            data, asked, count, length=length, stride=stride, sampler=sampler, model=ensemble, seed=seed
        )
    if exists:
        labels = PreferenceDataset.load(out).extend(labels)
    labels.save(out)
    first = int((labels.label_mass < 0.5).sum())
    say(
        f"{out}: {len(labels)} pairs of {labels.length} steps of {labels.dataset_id}; first preferred {first}, "
        f"second {len(labels) - first - int(labels.ties.sum())}, equal {int(labels.ties.sum())}"
    )
    say(f"fit a reward to them with: rlkit2 prefs fit {out} --dataset {dataset} --out reward")
    return 0


def _write_segments(arrays: SegmentArrays, dataset_id: str) -> PreferenceDataset:
    """The segments as a Minari dataset, and their labels."""
    segments, labels = arrays.as_dataset()
    segments.to_minari(dataset_id)
    rewards = "the file's rewards" if arrays.rewards is not None else "no rewards (0 everywhere)"
    say(
        f"{dataset_id}: {segments.num_episodes} segments as episodes of {int(segments.episode_lengths[0])} steps, with {rewards}; the last step of "
        "each is left out, as what followed it is not stored"
    )
    return labels


def _environment_maker(data: TransitionDataset, env: str | None, trust_env: bool) -> Callable[[], Env] | None:
    """Makes the environment named, or the dataset's, so that it draws frames; None where the dataset names none."""
    spec = data.spec.eval_env_spec or data.spec.env_spec
    if env is None and spec is None:
        return None
    return lambda: make_environment(evaluation_source(data.spec, env, trust_env=trust_env), render_mode="rgb_array")


def fit(
    labels: Positional[Path],
    *,
    out: Path,
    dataset: str | None = None,
    reading: HowToRead = AS_IS,
    fitting: Annotated[FitOptions, OmitArgPrefixes],
    test: float = 0.2,
    seed: int = 0,
    discount: float = 0.99,
    starc: bool = True,
    figure: Path | None = None,
    relabel_as: str | None = None,
    relabelling: Annotated[RelabelOptions, OmitArgPrefixes],
    json: bool = False,
) -> int:
    """Fit an ensemble of reward models to labels and hold it against the baselines.

    Example: rlkit2 prefs fit labels --out reward --relabel-as my/rooms/learned-v0

    Args:
        labels: folder of labels (rlkit2 prefs label).
        out: folder of the reward model.
        dataset: the dataset of the labels; default: the id they carry.
        reading: how to read it.
        fitting: how the ensemble is fitted.
        test: share of the pairs that judge the reward and take no part in fitting it.
        seed: of weights, bootstraps and the choice of pairs.
        discount: of the STARC distance.
        starc: estimate the STARC distance to the dataset's own reward.
        figure: draw calibration, accuracy by gap and returns into this file (.png, .svg, .pdf).
        relabel_as: also write a Minari dataset of this id with the learned rewards.
        relabelling: what becomes of the learned rewards before they are written.
        json: print everything as JSON.
    """
    found = PreferenceDataset.load(labels)
    if dataset is None and not found.dataset_id:
        raise ConfigError(f"{labels} does not say which dataset it belongs to; give --dataset")
    data = load_dataset(dataset or found.dataset_id, **reading.arguments())
    train, held_out = found.split(test, seed=seed)
    settings = asdict(fitting)
    with progress_bar("fitting") as bar:
        model = fit_reward_model(
            train, data, seeds=[seed], progress=lambda done, total, loss: bar(done, total), **settings
        )
    truth = data.rewards.double().numpy()
    rewards: dict[str, Any] = {"learned": model, **baseline_rewards(train, data, truth, seed=seed, **settings)}
    rows = {name: evaluate_reward(r, held_out, data, true_rewards=truth) for name, r in rewards.items()}
    distances = (
        starc_to_truth(data, {name: mean_rewards(r, data) for name, r in rewards.items()}, truth, discount=discount)
        if starc
        else {}
    )
    table = {name: {**row.to_dict(), **({"starc": distances[name]} if starc else {})} for name, row in rows.items()}
    model.description["evaluation"] = table
    model.save(out)
    if figure is not None:
        from rlkit2.reporting.preference_figures import reward_figure

        save_figure(reward_figure(model, rows["learned"], held_out, data, truth), figure, dpi=150)
    how = asdict(relabelling)
    save_rewards(out / REWARDS, data, *relabelled_rewards(data, model, **how))
    if relabel_as is not None:
        relabel(data, model, dataset_id=relabel_as, **how)
    if json:
        print_json({"reward": str(out), "description": model.description})
        return 0
    _print_rewards(table, f"{len(train)} labels of {found.length} steps, judged on {len(held_out)} held-out pairs")
    say(f"reward model: {out}" + (f", figure: {figure}" if figure else ""))
    say(f"train on its rewards with: rlkit2 train p_iql --dataset {data.spec.id} --rewards {out / REWARDS}")
    if relabel_as is not None:
        say(f"relabelled dataset: {relabel_as}")
    return 0


def _print_rewards(table: dict[str, dict[str, Any]], title: str) -> None:
    shown = Table(title=title, title_justify="left")
    columns = {
        "accuracy": "accuracy",
        "NLL": "nll",
        "Brier": "brier",
        "ECE": "ece",
        "AUROC of doubt": "disagreement_auroc",
        "segment rank": "segment_correlation",
        "episode rank": "return_correlation",
    }
    for name in ("reward", *columns, "STARC to true"):
        shown.add_column(name, justify="left" if name == "reward" else "right")
    for name, row in table.items():
        numbers = [row[key] for key in columns.values()]
        distance = row.get("starc")
        shown.add_row(name, *("n/a" if x is None else f"{x:.3f}" for x in numbers), _distance(distance))
    console().print(shown)


def _distance(found: dict[str, Any] | None) -> str:
    if not found or found["distance"] is None:
        return "insufficient data" if found else "n/a"
    interval = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{found['distance']:.3f}{interval}"


def study(
    dataset: Positional[str],
    *,
    out: Path,
    teachers: tuple[str, ...] = ("oracle", "mistake", "noisy"),
    budgets: tuple[int, ...] = (5, 15, 50, 150, 500),
    constructed: tuple[str, ...] = (),
    seeds: int = 5,
    length: int = 16,
    agent: str = "iql",
    steps: int = 5000,
    batch_size: int = 256,
    config: tuple[str, ...] = (),
    hidden_sizes: tuple[int, ...] = (64, 64),
    reward_steps: int = 500,
    reward_learning_rate: float = 1e-3,
    offset: str = "mean",
    discount: float = 0.97,
    episodes: int = 20,
    engine: str = "local",
    jobs: int | None = None,
    option: tuple[str, ...] = (),
    figure: Path | None = None,
    json: bool = False,
) -> int:
    """The loop from labels to regret: budgets, teachers and seeds in one table and picture.

    Example: rlkit2 prefs study builtin/pendulum --out study --config critic_learning_rate=1e-3 value_learning_rate=1e-3 policy_learning_rate=1e-3

    Args:
        dataset: Minari id, builtin/... id, D4RL-style .hdf5 file or folder; it needs reference returns.
        out: folder of the study; run the same command again to resume one that was stopped, or with more teachers or budgets.
        teachers: scripted teachers.
        budgets: labels.
        constructed: rewards made from the true one, at distances and accuracies that teachers do not bring together: "shaped 2" (a potential of
            twice its deviation), "noise 1", "offset -1", "blend 45" (degrees towards a random reward).
        seeds: seeds of every teacher and budget, trained together.
        length: steps of a segment.
        agent: the offline agent.
        steps: its updates.
        batch_size: transitions per update and seed.
        config: fields of the agent's configuration, name=value: --config expectile=0.9 inverse_temperature=3.
        hidden_sizes: hidden layers of the reward models and of the agent.
        reward_steps: most updates of the reward models.
        reward_learning_rate: of their Adam.
        offset: none, mean, min or max is subtracted from a learned reward; where episodes can end early, min says that living on is
            good and max that arriving is good.
        discount: of the STARC distance and of the agent.
        episodes: that measure the regret of a policy.
        engine: local (processes on this machine), ray or slurm.
        jobs: cells (a teacher with a budget) computed at the same time (local); default: as many as there are cores.
        option: settings of the engine, name=value, as in rlkit2 sweep.
        figure: picture of regret against distance and against accuracy; default: OUT/study.png.
        json: print everything as JSON.
    """
    from rlkit2.reporting.preference_figures import study_figure
    from rlkit2.studies.preferences_to_regret import StudySettings, run_study

    settings = StudySettings(
        dataset=dataset,
        teachers=teachers,
        budgets=budgets,
        constructed=constructed,
        seeds=seeds,
        length=length,
        discount=discount,
        offset=offset,
        reward={"hidden_sizes": list(hidden_sizes), "steps": reward_steps, "learning_rate": reward_learning_rate},
        agent=agent,
        agent_settings={"hidden_sizes": list(hidden_sizes), **name_values(config, "--config")},
        steps=steps,
        batch_size=batch_size,
        episodes=episodes,
    )
    with progress_bar("cells of the study") as bar:
        options = name_values(option, "--option")
        result = run_study(settings, out, engine=engine, jobs=jobs, options=options, progress=bar)
    texts = {name: f"rank correlation with regret {result.correlations[name]}" for name in ("starc", "error")}
    picture = figure or out / "study.png"
    save_figure(study_figure(result.rows, texts, f"{dataset}, {agent}"), picture, dpi=150)
    if json:
        print_json(result.to_dict())
        return 0
    _print_study(result)
    say(f"figure: {picture}")
    return 0


MEASURES = {
    "starc": "STARC distance",
    "error": "pair error",
    "difference": "|STARC| - |error|",
    "starc given error and budget": "STARC distance, given pair error and labels",
    "error given starc and budget": "pair error, given STARC distance and labels",
}


def _print_study(result: StudyResult) -> None:
    """The table of a study and its rank correlations."""
    settings = result.settings
    shown = Table(title=f"{settings.dataset}: means of {settings.seeds} seeds", title_justify="left")
    for name in ("reward", "labels", "accuracy", "STARC to true", "return", "regret"):
        shown.add_column(name, justify="left" if name == "reward" else "right")
    for row in result.table():
        distance = {"distance": row["starc"], "low": row["starc_low"], "high": row["starc_high"]}
        error = "" if row["regret_error"] is None else f" ({row['regret_error']:.3f})"
        shown.add_row(
            row["teacher"],
            str(row["budget"] or ""),
            f"{row['accuracy']:.3f}",
            _distance(distance),
            f"{row['return']:.1f}",
            f"{row['regret']:.3f}{error}",
        )
    console().print(shown)
    say("regret: 0 at the reference policy, 1 at a random one (standard error over seeds)")
    counts = {"learned": len(result.learned), "constructed": len(result.constructed)}
    for group, found in result.all_correlations.items():
        say(
            f"rank correlation with regret of {counts.get(group, sum(counts.values()))} {group.replace('all', 'learned and constructed')} rewards:"
        )
        for name, text in MEASURES.items():
            say(f"  {text}: {found[name]}")
    say(
        "(95 % intervals from a bootstrap that draws cells, a teacher with a budget or a construction, and seeds, independently of each other)"
    )
    regret = {row["teacher"]: row["regret"] for row in result.table() if not row["budget"]}
    if regret["true"] >= regret["zero"]:
        say(
            f"the true reward trains no better than none (regret {regret['true']:.3f}, {regret['zero']:.3f}): these regrets say nothing "
            "about rewards; give the agent more --steps or another --config"
        )


# name -> (function, one-line help, example)
SUBCOMMANDS: dict[str, Callable[..., int]] = {
    "label": label,
    "fit": fit,
    "study": study,
}


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return subcommand("prefs", SUBCOMMANDS, arguments)
