"""The card of a shared run or policy: data, command, scores with their intervals, versions; made from what its files say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlkit2 import __version__
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import RunError
from rlkit2.evaluation.evaluation import mean_text
from rlkit2.evaluation.scores import score_summary
from rlkit2.nn.policy import Policy
from rlkit2.training.run import Run


def run_card(run: Run, name: str) -> str:
    """The card of a run, Markdown with a YAML head.

    Args:
        run: what is shared.
        name: its place on the hub, `owner/name`.
    """
    config, manifest = run.config, run.manifest
    scores = _scores(run)
    spec = DatasetSpec.from_json(config["spec"])
    dataset = config["dataset"]
    start = manifest["starts"][-1] if manifest.get("starts") else {}
    facts = {
        "agent": config["agent"],
        "seeds": ", ".join(map(str, config["seeds"])),
        "updates": f"{manifest.get('step', 0):,} of {config['training']['steps']:,}",
        "status": run.status,
        "dataset": f"{dataset['id']}, {dataset.get('transitions', 0):,} transitions",
        "content hash": dataset["content_hash"],
        **_spaces(spec),
    }
    stopped = manifest.get("stopped") or {}
    if stopped:
        facts["seeds that stopped"] = ", ".join(f"{seed} at step {one['step']}" for seed, one in stopped.items())
    commands = [one["command"] for one in manifest.get("starts", ()) if one.get("command")]
    parts = [
        _head(name, config["agent"], dataset["id"], scores),
        f"# {name}",
        f"A policy of `{config['agent']}` trained offline on `{dataset['id']}` with rlkit2, {len(config['seeds'])} "
        f"seed{'s' * (len(config['seeds']) != 1)}.",
        "## Scores",
        _score_text(scores, spec),
        "## What it is",
        _table(
            ("", ""), [(key, f"`{value}`" if key == "content hash" else str(value)) for key, value in facts.items()]
        ),
        "## How it was made",
        "\n".join(["```sh", *commands, "```"]) if commands else "The command is not known.",
        _table(("setting", "value"), [(key, f"`{json.dumps(value)}`") for key, value in _settings(config).items()]),
        f"Made with {_versions(start)}.",
        _use(name, run=True),
    ]
    return "\n\n".join(parts) + "\n"


def policy_card(policy: Policy, name: str) -> str:
    """The card of a policy that comes without its run: what its own metadata tell."""
    known = policy.metadata
    spec = DatasetSpec.from_json(known["spec"]) if isinstance(known.get("spec"), str) else None
    dataset = known.get("dataset") or (spec.id if spec else "unknown")
    facts: dict[str, Any] = {
        "agent": known.get("agent", "unknown"),
        "seeds": ", ".join(map(str, policy.seeds)),
        "updates": known.get("step", "unknown"),
        "dataset": dataset,
        **({"content hash": f"`{spec.content_hash}`", **_spaces(spec)} if spec else {}),
    }
    parts = [
        _head(name, str(facts["agent"]), str(dataset), None),
        f"# {name}",
        f"A policy of `{facts['agent']}` trained offline on `{dataset}` with rlkit2.",
        _table(("", ""), [(key, str(value)) for key, value in facts.items()]),
        "Its scores and the command that made it are not known: it was shared without its run.",
        f"Shared with rlkit2 {__version__}.",
        _use(name, run=False),
    ]
    return "\n\n".join(parts) + "\n"


def _scores(run: Run) -> dict[str, Any] | None:
    try:
        return score_summary(run)
    except RunError:
        return None


def _score_text(scores: Mapping[str, Any] | None, spec: DatasetSpec) -> str:
    if scores is None:
        return "It was never evaluated while it was trained."
    last = scores["last"]["evaluations"]
    rows = [
        ("**final** (the number to report)", f"step {scores['final']['step']:,}", scores["final"]),
        (f"mean of the last {last}", f"{last} evaluations", scores["last"]),
        ("best (an oracle: picked by the score it shows)", f"step {scores['best']['step']:,}", scores["best"]),
    ]
    table = _table(
        (scores["unit"], "of", "mean (95 % interval)", "IQM"),
        [(name, of, mean_text(found), _number(found["iqm"])) for name, of, found in rows],
    )
    references = (
        f"Scores are per cent of the way from a random policy ({spec.ref_min_score:g}) to an expert ({spec.ref_max_score:g})."
        if scores["unit"] != "return" and spec.ref_min_score is not None and spec.ref_max_score is not None
        else ""
    )
    episodes = (
        f"{scores['final']['episodes']} episodes per seed; seeds {', '.join(map(str, scores['seeds']))}. {references}"
    )
    return f"{table}\n\n{episodes.strip()}"


def _spaces(spec: DatasetSpec) -> dict[str, str]:
    env = spec.eval_env_spec or spec.env_spec
    return {
        **({"environment": env.id} if env is not None else {}),
        "observations": str(spec.observation_space).replace("\n", " ")[:300],
        "actions": str(spec.action_space).replace("\n", " ")[:300],
        **({"stack of frames": str(spec.frame_stack)} if spec.frame_stack > 1 else {}),
    }


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config["config"], **config["data"], **config["training"]}


def _versions(start: Mapping[str, Any]) -> str:
    versions = start.get("versions") or {"rlkit2": __version__}
    python = [f"Python {start['python']}"] if "python" in start else []
    return ", ".join([*(f"{name} {version}" for name, version in versions.items()), *python])


def _use(name: str, *, run: bool) -> str:
    short = name.rpartition("/")[2]
    folder = "policy = rlkit2.load_policy(rlkit2.pull(" + json.dumps(name) + "))"
    code = ["```python", "import rlkit2", "", folder, "```"]
    shell = ["```sh", f"rlkit2 pull {name}", f"rlkit2 evaluate runs/{short}", "```"]
    more = "The files are JSON and tensors; opening them runs nothing." if run else ""
    return "\n".join(["## How to use it", "", *shell, "", *code, "", more]).rstrip()


def _head(name: str, agent: str, dataset: str, scores: Mapping[str, Any] | None) -> str:
    """YAML; its values are written as JSON, which is YAML."""
    lines = [
        "---",
        "library_name: rlkit2",
        "pipeline_tag: reinforcement-learning",
        f"tags: {json.dumps(['reinforcement-learning', 'offline-reinforcement-learning', 'rlkit2', agent])}",
    ]
    if scores is not None and scores["final"]["mean"] is not None:
        result = {
            "task": {"type": "reinforcement-learning", "name": "reinforcement-learning"},
            "dataset": {"name": dataset, "type": dataset},
            "metrics": [
                {"type": "mean_reward", "name": scores["unit"], "value": mean_text(scores["final"]), "verified": False}
            ],
        }
        lines += [
            "model-index:",
            f"- name: {json.dumps(name.rpartition('/')[2])}",
            f"  results: {json.dumps([result])}",
        ]
    return "\n".join([*lines, "---"])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"
