"""The toy demonstration of gradient entanglement: small language models, a sentiment grammar, DPO and its remedies.

A model is fitted to sentences of which 30 % carry the wrong sentiment word, then trained by DPO on pairs that differ in that word alone
and share a suffix of 0, 2 or 12 words. The longer the suffix, the larger the cosine between the two gradients and the earlier the chosen
log-probability falls; the remedies act against that. Every finished run is kept in the output folder, so an interrupted study continues
where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save
from torch import Tensor

from rlkit2.entanglement.mitigation import (
    band_coefficients,
    coefficient_loss,
    group_normalised_loss,
    mask_shared_tokens,
    normalised_coefficients,
)
from rlkit2.entanglement.probe import EntanglementProbe
from rlkit2.entanglement.token_mask import TokenMask, masked_loss
from rlkit2.errors import ConfigError
from rlkit2.files import make_folder, write_atomically, write_json
from rlkit2.losses.margin import MarginInputs, margin_coefficients, margin_loss
from rlkit2.preferences.entanglement import PairBatch, SequenceScore, causal_lm_logp, pair_geometry
from rlkit2.processes import run_jobs
from rlkit2.studies.toy_language import PROMPT_LENGTH, SentimentGrammar, SmallGPT
from rlkit2.training.run_files import read_json

REMEDIES = {
    "none": "DPO alone",
    "normalised": "normalised descent (whole batch)",
    "normalised_pairs": "normalised descent (per pair)",
    "band": "coefficients clipped into the ideal band",
    "likelihood": "DPO + 0.05 x likelihood of the chosen",
    "dpop": "DPOP, lam 5",
    "token_mask": "shared tokens masked",
    "learned_mask": "learned sparse token mask",
}

SPARSITY = 0.01
"""Weight of the learned mask's mean."""
MASK_RATE = 100
"""Learning rate of the mask over that of the model."""


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of the demonstration.

    Args:
        suffixes: words shared by both completions; the remedies are tried on the last one.
        remedies: which of `REMEDIES` to try; "none" is always there.
        seeds: how many independent runs.
        fit_steps: steps of supervised fitting (AdamW 1e-3, batch 64).
        steps: steps of preference training (batch 32).
        learning_rate: of preference training.
        optimizer: adam or sgd.
        every: steps between measurements.
        held_out: pairs that the curves are measured on.
        probes: pairs whose gradients are measured.
        width: of the model (2 layers).
    """

    suffixes: tuple[int, ...] = (0, 2, 12)
    remedies: tuple[str, ...] = tuple(REMEDIES)
    seeds: int = 3
    fit_steps: int = 250
    steps: int = 300
    learning_rate: float = 1e-5
    optimizer: str = "adam"
    every: int = 50
    held_out: int = 256
    probes: int = 32
    width: int = 64

    def __post_init__(self) -> None:
        unknown = [name for name in self.remedies if name not in REMEDIES]
        if unknown:
            raise ConfigError(f"unknown remedy {unknown[0]!r}; known: {', '.join(REMEDIES)}")
        if self.optimizer not in ("adam", "sgd"):
            raise ConfigError(f"optimizer={self.optimizer!r} must be adam or sgd")
        if not self.suffixes:
            raise ConfigError("suffixes is empty: give at least one length")
        for name in ("seeds", "fit_steps", "steps", "every", "held_out", "probes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def runs(self) -> list[tuple[int, str, int]]:
        """(suffix, remedy, seed) of every run."""
        remedies = [name for name in self.remedies if name != "none"]
        cases = [(suffix, "none") for suffix in self.suffixes] + [(self.suffixes[-1], name) for name in remedies]
        return [(suffix, remedy, seed) for suffix, remedy in cases for seed in range(self.seeds)]


def fit(config: ToyConfig, suffix: int, seed: int) -> SmallGPT:
    """The model before preference training: fitted to completions of which 30 % have the wrong sentiment word."""
    torch.manual_seed(seed)
    grammar, model = SentimentGrammar(suffix, seed), SmallGPT(width=config.width)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(config.fit_steps):
        ids = grammar.labelled(64)
        logits = model(ids[:, :-1])[:, PROMPT_LENGTH - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT_LENGTH:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


def objective(
    remedy: str, score: SequenceScore, pairs: PairBatch, reference: Tensor, mask: TokenMask | None = None
) -> Tensor:
    """The loss of a batch of pairs under one remedy (shared tokens are masked in the pairs themselves).

    Args:
        reference: log-probabilities of tokens under the reference, `[2P, T]`, zero outside completions.
        mask: for "learned_mask".
    """
    rows = pairs.rows
    tokens = score.terms(score.params, rows)
    logp_w, logp_l = tokens.sum(-1).chunk(2)
    inputs = MarginInputs(logp_w, logp_l, *reference.sum(-1).chunk(2))
    if remedy == "dpop":
        return margin_loss("dpop", inputs, lam=5.0).mean()  # type: ignore[no-any-return]
    value: Tensor = margin_loss("dpo", inputs)
    if remedy == "likelihood":
        return (value - 0.05 * logp_w).mean()
    if remedy == "learned_mask":
        assert mask is not None
        completions = score.mask(rows).to(tokens.dtype)
        with torch.no_grad():
            states = score.hidden_states(score.params, rows)
        sides = [x.chunk(2) for x in (tokens, reference, mask(states), completions)]
        return masked_loss("dpo", *sides, sparsity=SPARSITY).mean()  # type: ignore[arg-type]
    if remedy in ("normalised", "normalised_pairs", "band"):
        d_w, d_l = margin_coefficients("dpo", inputs)
        if remedy == "normalised":
            return group_normalised_loss(logp_w, logp_l, d_w, d_l, score.params.values(), value=value)
        geometry = pair_geometry(score, None, pairs, method="ghost")
        changed = (band_coefficients if remedy == "band" else normalised_coefficients)(geometry, d_w, d_l)
        return coefficient_loss(logp_w, logp_l, *changed, value=value).mean()
    return value.mean()


def train(config: ToyConfig, model: SmallGPT, suffix: int, remedy: str, seed: int) -> list[dict[str, Any]]:
    """Preference training of `model` (in place): one record per measurement, the first before any step."""
    score = causal_lm_logp(model)
    frozen_model = SmallGPT(width=config.width)
    frozen_model.load_state_dict(model.state_dict())
    frozen = causal_lm_logp(frozen_model, parameters="all")
    grammar, held_out = (
        SentimentGrammar(suffix, 10_000 + seed),
        SentimentGrammar(suffix, 20_000 + seed).pairs(config.held_out),
    )
    probe = EntanglementProbe(score, held_out.select(slice(0, config.probes)), "dpo", reference="initial", dry_run=())
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.SGD
    optimizer = kind(model.parameters(), config.learning_rate)
    mask = TokenMask(config.width) if remedy == "learned_mask" else None
    if mask is not None:
        optimizer.add_param_group({"params": list(mask.parameters()), "lr": MASK_RATE * config.learning_rate})
    records: list[dict[str, Any]] = []
    for step in range(config.steps + 1):
        if measured := step % config.every == 0 or step == config.steps:
            records.append({"step": step, **_held_out(score, held_out)})
            probe.before()
        pairs = grammar.pairs(32)
        if remedy == "token_mask":
            pairs = mask_shared_tokens(pairs)
        with torch.no_grad():
            reference = frozen.terms(frozen.params, pairs.rows)
        loss = objective(remedy, score, pairs, reference, mask)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if measured:  # what this step was predicted to do and did, on pairs that it did not see
            found = probe.after(step=step)
            kept = ("cosine", "score", "regimes", "meters", "disagreement", "own_size", "cross_size", "changes")
            records[-1] |= {name: found[name] for name in kept}
    return records


def _held_out(score: SequenceScore, pairs: PairBatch) -> dict[str, float]:
    with torch.no_grad():
        chosen, rejected = score.sums(score.params, pairs.rows).chunk(2)
    return {
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
        "accuracy": float((chosen > rejected).double().mean()),
    }


# --- the whole study -------------------------------------------------------------------------------------------------------------


def _fit_once(config: ToyConfig, suffix: int, seed: int, folder: Path) -> None:
    """Fit and keep the weights; in a process of its own with one thread."""
    torch.set_num_threads(1)
    model = fit(config, suffix, seed)
    weights = {name: p.detach() for name, p in model.named_parameters()}  # the tied tensor once
    write_atomically(_fit_path(folder, suffix, seed), save(weights))


def _fit_path(folder: Path, suffix: int, seed: int) -> Path:
    return folder / "fits" / f"suffix{suffix}-seed{seed}.safetensors"


def _run_once(config: ToyConfig, suffix: int, remedy: str, seed: int, folder: Path) -> None:
    """Train from the kept weights and write the records; in a process of its own with one thread."""
    torch.set_num_threads(1)
    model = SmallGPT(width=config.width)
    model.load_state_dict(load_file(_fit_path(folder, suffix, seed)), strict=False)
    records = train(config, model, suffix, remedy, seed)
    write_json(
        _run_path(folder, suffix, remedy, seed), {"suffix": suffix, "remedy": remedy, "seed": seed, "records": records}
    )


def _run_path(folder: Path, suffix: int, remedy: str, seed: int) -> Path:
    return folder / "runs" / f"suffix{suffix}-{remedy}-seed{seed}.json"


def run_toy(
    config: ToyConfig | None = None,
    out: str | Path = "entanglement-toy",
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run what is not yet in `out`, and return the summary of all runs (also written there as `toy.json`).

    Args:
        out: folder of finished runs and results.
        workers: processes; default: the number of processor cores.
        progress: called with (finished, all) runs.

    Raises:
        ConfigError: `out` holds runs of another configuration.
    """
    config = config or ToyConfig()
    folder = Path(out)
    for name in ("fits", "runs"):
        make_folder(folder / name)
    _same_settings(folder, config)
    fits = list(dict.fromkeys((suffix, seed) for suffix, _, seed in config.runs))
    stages: list[list[tuple[Any, ...]]] = [
        [(_fit_once, config, *fit, folder) for fit in fits if not _fit_path(folder, *fit).is_file()],
        [(_run_once, config, *run, folder) for run in config.runs if not _run_path(folder, *run).is_file()],
    ]
    everything = len(fits) + len(config.runs)
    done = everything - sum(map(len, stages))
    for stage in stages:
        for _ in run_jobs(stage, workers or os.cpu_count() or 1):
            done += 1
            if progress:
                progress(done, everything)
    summary = summarise([read_json(_run_path(folder, *run)) for run in config.runs], config)
    write_json(folder / "toy.json", summary)
    return summary


def _same_settings(folder: Path, config: ToyConfig) -> None:
    """Finished runs of another configuration must not be mixed in."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("suffixes", "remedies", "seeds")}
    path = folder / "settings.json"
    if path.is_file():
        before = read_json(path)
        for name, value in settings.items():
            if before.get(name) != value:
                raise ConfigError(
                    f"{folder} holds runs with {name}={before.get(name)}: choose another folder for {name}={value}"
                )
    write_json(path, settings)


def summarise(runs: Sequence[dict[str, Any]], config: ToyConfig) -> dict[str, Any]:
    """Means over seeds per case, and the values of every seed."""
    cases = []
    for suffix, remedy in dict.fromkeys(run[:2] for run in config.runs):
        mine = [run["records"] for run in runs if (run["suffix"], run["remedy"]) == (suffix, remedy)]
        case: dict[str, Any] = {"suffix": suffix, "remedy": remedy, "steps": [r["step"] for r in mine[0]]}
        for name in ("chosen", "rejected", "accuracy"):
            case[name] = [[record[name] for record in records] for records in mine]
        case["cosine"] = [[record["cosine"]["mean"] for record in records] for records in mine]
        case["share_chosen_rises"] = {
            meter: [[record["meters"][meter]["share_chosen_rises"] for record in records] for records in mine]
            for meter in ("pair", "batch", "optimizer", "realised")
        }
        case["changes"] = mine[0][-1]["changes"]
        cases.append(case)
    return {"config": json.loads(json.dumps(asdict(config))), "cases": cases}


def figure(summary: dict[str, Any]) -> Figure:
    """Four panels: chosen by suffix, cosine by suffix, chosen and rejected of every remedy at the longest suffix; a thin line per seed."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    longest = summary["config"]["suffixes"][-1]
    plain = [case for case in summary["cases"] if case["remedy"] == "none"]
    treated = [case for case in summary["cases"] if case["suffix"] == longest]
    _panel(
        panels[0, 0],
        plain,
        "chosen",
        "chosen log-probability, change under DPO",
        lambda c: f"{c['suffix']} shared words",
    )
    _panel(
        panels[0, 1],
        plain,
        "cosine",
        "cosine of the two gradients",
        lambda c: f"{c['suffix']} shared words",
        change=False,
    )
    title = f"log-probability, change with {longest} shared words"
    _panel(panels[1, 0], treated, "chosen", f"chosen {title}", lambda c: REMEDIES[c["remedy"]])
    _panel(panels[1, 1], treated, "rejected", f"rejected {title}", lambda c: REMEDIES[c["remedy"]])
    return figure


def _panel(
    axes: Any,
    cases: Sequence[dict[str, Any]],
    name: str,
    title: str,
    label: Callable[[dict[str, Any]], str],
    *,
    change: bool = True,
) -> None:
    for index, case in enumerate(cases):
        lines = torch.tensor(case[name], dtype=torch.float64)
        lines = lines - lines[:, :1] if change else lines
        for line in lines:
            axes.plot(case["steps"], line, color=f"C{index}", linewidth=0.6, alpha=0.45)
        axes.plot(case["steps"], lines.mean(0), color=f"C{index}", linewidth=2, label=label(case))
    if change:
        axes.axhline(0, color="0.5", linewidth=0.8, linestyle=":")
    axes.set(title=title, xlabel="steps of preference training")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
