"""`rlkit2 entangle ...`: how a preference loss moves both log-probabilities: by formula, under a model, in a demonstration."""

from __future__ import annotations

import json as json_format
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import FlagCreatePairsOff, Positional, arg

from rlkit2.cli import output
from rlkit2.cli.parsing import subcommand
from rlkit2.errors import ConfigError
from rlkit2.progress import progress_bar

Hyper = Annotated[tuple[str, ...], arg(metavar="NAME=VALUE...")]
Format = Literal["auto", "explicit", "implicit", "hh", "ultrafeedback", "sharegpt", "alpaca"]
Names = Annotated[tuple[str, ...], arg(metavar="NAME...")]


def losses(
    *,
    only: Names = (),
    chosen: float = -12.0,
    rejected: float = -11.0,
    ref_chosen: float = -11.5,
    ref_rejected: float = -11.5,
    len_chosen: int = 10,
    len_rejected: int = 14,
    cosine: float = 0.9,
    norm_chosen: float = 1.0,
    norm_rejected: float = 1.2,
    json: bool = False,
) -> int:
    """Table of the margin losses: coefficients, conditions and bounds for one pair.

    Example: rlkit2 entangle losses --cosine 0.95 --only dpo simpo cpo

    Args:
        only: names of losses; default: all.
        chosen: summed log-probability of the chosen completion.
        rejected: summed log-probability of the rejected completion.
        ref_chosen: the same under the reference.
        ref_rejected: the same under the reference.
        len_chosen: tokens of the chosen completion.
        len_rejected: tokens of the rejected completion.
        cosine: of the angle between the two gradients.
        norm_chosen: length of the chosen's gradient.
        norm_rejected: length of the rejected's gradient.
        json: print JSON.
    """
    from rlkit2.entanglement.loss_table import loss_table

    rows = loss_table(
        only,
        logps=(chosen, rejected),
        reference=(ref_chosen, ref_rejected),
        lengths=(len_chosen, len_rejected),
        cosine=cosine,
        norms=(norm_chosen, norm_rejected),
    )
    out = output.console()
    if json:
        out.print_json(json_format.dumps(rows))
        return 0
    table = Table(
        title=f"one pair: cosine {cosine:g}, |g_w| {norm_chosen:g}, |g_l| {norm_rejected:g}", title_justify="left"
    )
    table.add_column("loss", no_wrap=True)
    for name in ("d_w", "d_l", "u", "chosen falls from cos", "rejected rises from cos", "margin rate"):
        table.add_column(name, justify="right")
    table.add_column("this pair", no_wrap=True)
    table.add_column("u in words")
    for row in rows:
        numbers = [row[k] for k in ("d_w", "d_l", "u", "chosen_falls_from", "rejected_rises_from", "margin_rate")]
        table.add_row(row["loss"], *(_number(x) for x in numbers), row["regime"].replace("_", " "), row["ratio"])
    out.print(table)
    out.print(
        "The chosen rises while the cosine is below its bound, the rejected falls while it is below the other; a bound above 1 is never reached."
    )
    return 0


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def model(
    *,
    model: Path,
    pairs: Path,
    loss: str = "dpo",
    hyper: Hyper = (),
    reference: Path | None = None,
    format: Format = "auto",
    limit: int = 64,
    max_length: int | None = None,
    method: Literal["auto", "loop", "vmap", "ghost", "sketch", "head"] = "auto",
    microbatch: int = 8,
    sketch_dim: int = 1024,
    group_by: Literal["layer", "parameter"] = "layer",
    dtype: Literal["float32", "float64", "bfloat16"] = "float32",
    device: str = "cpu",
    out: Path = Path("entanglement"),
    json: bool = False,
) -> int:
    """Gradients of preference pairs under a language model or reward model.

    Example: rlkit2 entangle model --model ./my-model --pairs pairs.jsonl --loss dpo --hyper beta=0.1

    Args:
        model: folder of a causal language model or a reward model (one label) that transformers loads; nothing is downloaded.
        pairs: JSON lines, a JSON array, Parquet or a folder of datasets; ref_chosen_logps and ref_rejected_logps go before --reference.
        loss: name of the loss, also TRL's; see rlkit2 entangle losses.
        hyper: hyper-parameters of the loss, such as beta=0.1.
        reference: folder of the reference model; default: the model itself, as at the start of training.
        format: of the rows; auto: told from the first one.
        limit: the first so many pairs.
        max_length: cut rows there.
        method: how gradients are measured; auto: ghost where the model allows it, else loop.
        microbatch: pairs at a time.
        sketch_dim: size of sketches.
        group_by: parts of the inner product.
        dtype: number format to load the model in.
        device: cpu or cuda.
        out: folder of report.json and report.html.
        json: print the report as JSON.
    """
    from rlkit2.entanglement.diagnose import diagnose
    from rlkit2.entanglement.model_folder import ModelFolder, reference_scores
    from rlkit2.entanglement.pair_files import read_pairs
    from rlkit2.files import make_folder, write_json
    from rlkit2.reporting.entanglement_figures import write_model_page

    examples = read_pairs(pairs, limit, format=format, tell=partial(output.say, stderr=True))
    loaded = ModelFolder.load(model, dtype=dtype, device=device)
    batch = loaded.rows(examples, max_length=max_length)
    frozen = None if reference is None else ModelFolder.load(reference, dtype=dtype, device=device)
    given = reference_scores(loaded, examples, batch, frozen, max_length=max_length, microbatch=microbatch)
    with progress_bar("gradients") as bar:
        report = diagnose(
            loaded.score,
            batch,
            loss,
            hyperparameters=_hyperparameters(hyper),
            reference=given,
            method=method,
            microbatch=microbatch,
            sketch_dim=sketch_dim,
            group_by=group_by,
            progress=bar,
        )
    report["model"], report["pairs_file"] = str(model), str(pairs)
    report["reference"] = "given" if given is not None else "the model itself"
    labels = None
    if "tokens" in report:
        sides = [
            loaded.tokenizer.convert_ids_to_tokens(report["tokens"][f"ids_{side}"]) for side in ("chosen", "rejected")
        ]
        labels = sides[0], sides[1]
        report["tokens"]["labels_chosen"], report["tokens"]["labels_rejected"] = labels
    make_folder(out)
    write_json(out / "report.json", report)
    page = write_model_page(
        report, out / "report.html", title=f"entanglement of {model.name} on {pairs.name}", labels=labels
    )
    console = output.console()
    if json:
        console.print_json(json_format.dumps(report))
    else:
        _print(console, report)
        console.print(f"written: {out / 'report.json'}, {page}", highlight=False)
    return 0


def rank(
    model: Positional[Path],
    data: Positional[Path],
    *,
    out: Path = Path("ranked.jsonl"),
    exact: int = 200,
    by: Literal["edit", "ches", "ches_mean", "head_gap", "head_ratio"] = "head_gap",
    then_by: Literal["gap", "gap_mean", "c_w", "cosine"] = "gap",
    head: bool = True,
    method: Literal["auto", "ghost", "loop", "sketch"] = "auto",
    sketch_dim: int = 1024,
    format: Format = "auto",
    limit: int | None = None,
    max_length: int | None = None,
    microbatch: int = 4,
    dtype: Literal["float32", "float64", "bfloat16"] = "float32",
    device: str = "cpu",
    top: int = 10,
    json: bool = False,
) -> int:
    """Rank the pairs of a file by the harm they are likely to do to their chosen completions.

    Example: rlkit2 entangle rank ./my-model pairs.jsonl --out ranked.jsonl

    Args:
        model: folder of a causal language model that transformers loads; nothing is downloaded.
        data: JSON lines, a JSON array, Parquet or a folder of datasets.
        out: the ranking as JSON lines, a figure beside it, and the scores, from which an interrupted or extended ranking continues.
        exact: so many pairs, the worst by the cheap score, have their gradients measured.
        by: the cheap score, of all pairs.
        then_by: what the measured pairs are ordered by.
        head: the scores of the output matrix (head_gap, head_ratio); --no-head leaves them out: cheaper, and --by must be another.
        method: how gradients are measured; auto: ghost where the model allows it, else loop.
        sketch_dim: size of sketches.
        format: of the rows; auto: told from the first one.
        limit: the first so many pairs; default: all.
        max_length: cut rows there.
        microbatch: pairs at a time.
        dtype: number format to load the model in.
        device: cpu or cuda.
        top: pairs to print.
        json: print the first pairs as JSON.
    """
    from rlkit2.entanglement.model_folder import ModelFolder
    from rlkit2.entanglement.pair_files import read_pairs
    from rlkit2.files import save_figure
    from rlkit2.reporting.entanglement_figures import ranking_figure
    from rlkit2.studies.pair_ranking import rank_pairs

    examples = read_pairs(data, limit, format=format, tell=partial(output.say, stderr=True))
    loaded = ModelFolder.load(model, dtype=dtype, device=device)
    with progress_bar("scoring pairs") as bar:
        lines = rank_pairs(
            loaded,
            examples,
            out,
            exact=exact,
            by=by,
            then_by=then_by,
            head=head,
            method=method,
            sketch_dim=sketch_dim,
            max_length=max_length,
            microbatch=microbatch,
            progress=bar,
        )
    drawn = ranking_figure(lines, by)
    figure = out.with_suffix(".svg")
    save_figure(drawn, figure)
    if json:
        output.print_json({"pairs": len(lines), "ranked": lines[:top]})
        return 0
    _print_ranking(lines, examples, by, top)
    output.say(f"written: {out}, {figure}")
    return 0


def _print_ranking(lines: Sequence[dict[str, Any]], examples: Sequence[Any], by: str, top: int) -> None:
    skipped = [line for line in lines if "skipped" in line]
    measured = [line for line in lines if "c_w" in line]
    names = (by, "edit", "gap", "c_w")
    rows = [
        (
            str(line["rank"]),
            str(line["index"]),
            *(f"{line[name]:.3g}" if name in line else "-" for name in dict.fromkeys(names)),
            _start_of(examples[line["index"]]["chosen"]),
            _start_of(examples[line["index"]]["rejected"]),
        )
        for line in lines[:top]
        if "skipped" not in line
    ]
    header = ("rank", "pair", *dict.fromkeys(names), "chosen", "rejected")
    output.print_table(header, rows, left=0, title="pairs from the most to the least harmful")
    above = sum(line["c_w"] > 1 for line in measured)
    output.say(
        f"{len(lines) - len(skipped)} pairs scored by {by}, the gradients of the worst {len(measured)} measured: for {above} of these a DPO step on "
        "the pair alone lowers its chosen (c_w above 1)"
    )
    if skipped:
        output.say(f"{len(skipped)} pairs left out, the first (pair {skipped[0]['index']}): {skipped[0]['skipped']}")


def _start_of(completion: Any, length: int = 36) -> str:
    text = completion if isinstance(completion, str) else completion[0]["content"]
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _hyperparameters(given: Sequence[str]) -> dict[str, float]:
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError as error:
            raise ConfigError(f"--hyper {text!r} must be name=number, such as beta=0.1") from error
        if not equals:
            raise ConfigError(f"--hyper {text!r} must be name=number, such as beta=0.1")
    return found


def _print(out: Console, report: dict[str, Any]) -> None:
    if report["proxy"]:
        out.print("method head is a proxy: the output matrix alone overlooks entanglement", style="bold")
    out.print(
        f"{report['pairs']} pairs, loss {report['loss']}, method {report['method']}, {report['parameters']}; "
        f"reference: {report['reference']}",
        highlight=False,
    )
    cosine = report["cosine"]
    out.print(f"cosine: mean {cosine['mean']:.3f}, 10 % {cosine['p10']:.3f}, 90 % {cosine['p90']:.3f}; "
              f"score above 1 for {100 * report['share_score_above_1']:.0f} % of pairs", highlight=False)  # fmt: skip
    table = Table()
    for name in ("meter", "chosen", "rejected", "chosen rises", "rejected falls", "both down", "both up"):
        table.add_column(name, justify="left" if name == "meter" else "right")
    for meter in report["meters"].values():
        shares = (meter[f"share_{name}"] for name in ("chosen_rises", "rejected_falls", "both_down", "both_up"))
        table.add_row(
            meter["means"], f"{meter['chosen']:.3g}", f"{meter['rejected']:.3g}", *(f"{100 * s:.0f} %" for s in shares)
        )
    out.print(table)
    out.print(
        f"own part {report['own_size']:.3g}, other pairs' part {report['cross_size']:.3g} of a batch step's rate; undecided: "
        f"{100 * report['share_undecided']:.0f} % of pairs; margin falls for {100 * report['share_margin_falls']:.0f} %",
        highlight=False,
    )
    for name, found in report["remedies"].items():
        out.print(
            f"with {name}: ideal {100 * found['share_ideal']:.0f} %, batch rates {found['batch_chosen']:.3g} and "
            f"{found['batch_rejected']:.3g}",
            highlight=False,
        )


def toy(
    *,
    out: Path = Path("entanglement-toy"),
    suffixes: tuple[int, ...] = (0, 2, 12),
    remedies: Names = (
        "normalised",
        "normalised_pairs",
        "band",
        "likelihood",
        "dpop",
        "token_mask",
        "learned_mask",
    ),
    seeds: int = 3,
    steps: int = 300,
    fit_steps: int = 250,
    learning_rate: float = 1e-5,
    optimizer: Literal["adam", "sgd"] = "adam",
    every: int = 50,
    workers: int | None = None,
    json: bool = False,
) -> int:
    """Train small language models that show the effect and its remedies.

    Example: rlkit2 entangle toy --out toy

    Args:
        out: folder of finished runs, toy.json, toy.svg and toy.png; an interrupted study is resumed there.
        suffixes: words shared by both completions, 0 to 12; the remedies are tried on the last.
        remedies: any of normalised, normalised_pairs, band, likelihood, dpop, token_mask, learned_mask.
        seeds: independent runs.
        steps: of preference training.
        fit_steps: of supervised fitting before it.
        learning_rate: of preference training.
        optimizer: adam or sgd.
        every: steps between measurements.
        workers: processes; default: one per core.
        json: print the curves as JSON.
    """
    from rlkit2.files import save_figure
    from rlkit2.studies.entanglement_toy import REMEDIES, ToyConfig, figure, run_toy

    config = ToyConfig(
        suffixes=suffixes,
        remedies=("none", *remedies),
        seeds=seeds,
        steps=steps,
        fit_steps=fit_steps,
        learning_rate=learning_rate,
        optimizer=optimizer,
        every=every,
    )
    with progress_bar("training small language models") as bar:
        summary = run_toy(config, out, workers=workers, progress=bar)
    drawn = figure(summary)
    for name in ("toy.svg", "toy.png"):
        save_figure(drawn, out / name, dpi=130)
    console = output.console()
    if json:
        console.print_json(json_format.dumps(summary))
        return 0
    table = Table(title="mean over seeds, on pairs that were not trained on", title_justify="left")
    for name in ("shared words", "remedy", "cosine at start", "chosen at start", "chosen at end", "rejected at end"):
        table.add_column(name, justify="left" if name == "remedy" else "right")
    for case in summary["cases"]:
        mean = {k: [sum(c) / len(c) for c in zip(*case[k], strict=True)] for k in ("chosen", "rejected", "cosine")}
        numbers = (mean["cosine"][0], mean["chosen"][0], mean["chosen"][-1], mean["rejected"][-1])
        table.add_row(str(case["suffix"]), REMEDIES[case["remedy"]], *(f"{x:.2f}" for x in numbers))
    console.print(table)
    console.print(f"written: {out / 'toy.json'}, {out / 'toy.svg'}, {out / 'toy.png'}", highlight=False)
    return 0


# name -> (function, one-line help, example)
SUBCOMMANDS: dict[str, Callable[..., int]] = {
    "losses": losses,
    "model": model,
    "rank": rank,
    "toy": toy,
}


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return subcommand("entangle", SUBCOMMANDS, arguments, config=(FlagCreatePairsOff,))
