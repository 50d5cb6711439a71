"""How well do scores that are taken before training foretell which chosen completions DPO will lower?

    .venv/bin/python benchmarks/entanglement_ranking.py                # both models, 3 seeds
    .venv/bin/python benchmarks/entanglement_ranking.py --only toy
    .venv/bin/python benchmarks/entanglement_ranking.py --memory 1000 512    # what ranking a dataset takes

Two models, trained here in minutes: the grammar of `rlkit2 entangle toy` with shared endings of 0 to 12 words, half of them worded anew in the
rejected; and a GPT-2 of two layers (transformers, byte-pair tokens) on the docstrings of Python's standard library, whose chosen completions are
the true continuations and whose rejected ones are a third each the model's own samples, the continuation with a few tokens sampled anew, and another
text's continuation. All pairs are scored, then trained on with DPO; what is foretold is the fall of each pair's chosen log-probability, in all and
per token; length and log-probability of the chosen stand beside as baselines. Printed: Spearman's correlation of
score and fall, mean over seeds, with a 95 % percentile bootstrap over the pairs of each seed.
"""

from __future__ import annotations

import argparse
import ast
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report
from scipy.stats import spearmanr

from rlkit2.entanglement.measure import pair_geometry
from rlkit2.entanglement.pair_scores import forward_scores, gradient_scores, measured_scores
from rlkit2.losses.margin import MarginInputs, margin_loss
from rlkit2.preferences.entanglement import PairBatch, SequenceScore, causal_lm_logp
from rlkit2.studies.toy_language import PROMPT_LENGTH, SentimentGrammar, SmallGPT

SUFFIXES = (0, 2, 4, 8, 12)


# --- the toy language


def toy(seed: int, pairs: int) -> tuple[SequenceScore, PairBatch, torch.Tensor]:
    """A model fitted to endings of all lengths, pairs of all lengths, and their kinds."""
    torch.manual_seed(seed)
    model = SmallGPT()
    grammars = [SentimentGrammar(n, seed) for n in SUFFIXES]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(400):
        ids = grammars[step % len(grammars)].labelled(64)
        logits = model(ids[:, :-1])[:, PROMPT_LENGTH - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT_LENGTH:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sides: tuple[list[Any], list[Any]] = ([], [])
    kinds: list[int] = []
    for k, n in enumerate(SUFFIXES):
        grammar, other = SentimentGrammar(n, 1000 + seed), SentimentGrammar(n, 2000 + seed)
        count = pairs // len(SUFFIXES)
        found, endings = grammar.pairs(count), other.pairs(count).chosen["input_ids"]
        rejected = found.rejected["input_ids"].clone()
        rejected[::2, PROMPT_LENGTH + 1 :] = endings[::2, PROMPT_LENGTH + 1 :]
        for side, ids in zip(sides, (found.chosen["input_ids"], rejected), strict=True):
            side += [(row.tolist(), [0] * PROMPT_LENGTH + [1] * (len(row) - PROMPT_LENGTH)) for row in ids]
        kinds += [2 * k + i % 2 for i in range(count)]
    return causal_lm_logp(model), _batch(sides), torch.tensor(kinds)


# --- a small real language model


def docstrings(most: int = 2_000_000) -> list[str]:
    """Docstrings of the standard library, in a fixed order."""
    texts: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts or "idlelib" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    texts.append(text)
                    size += len(text)
        if size > most:
            break
    return texts


def real(seed: int, pairs: int, steps: int) -> tuple[SequenceScore, PairBatch, torch.Tensor]:
    """A GPT-2 of two layers fitted to docstrings, pairs of three kinds, and their kinds."""
    import tokenizers
    import transformers

    texts = docstrings()
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=2000, show_progress=False)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(texts))
    held, train = order[: len(texts) // 4], order[len(texts) // 4 :]
    stream = torch.tensor([i for k in train for i in [0, *tokenizer.encode(texts[k]).ids]])
    config = transformers.GPT2Config(
        vocab_size=2000, n_positions=128, n_embd=128, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        starts = torch.from_numpy(rng.integers(0, len(stream) - 97, 16))
        ids = stream[starts[:, None] + torch.arange(97)]
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"seed {seed}: {len(stream)} tokens, last loss {loss:.2f} nats", file=sys.stderr)
    long = [ids for k in held if len(ids := tokenizer.encode(texts[k]).ids) > 80]
    sides: tuple[list[Any], list[Any]] = ([], [])
    kinds = []
    model.eval()
    for i in range(pairs):
        ids, other = long[i % len(long)], long[(i * 7 + 1) % len(long)]
        prompt, length = [0, *ids[:24]], int(rng.integers(6, 33))
        chosen = ids[24 : 24 + length]
        kind = i % 3
        if kind == 0:
            rejected = _sample(model, prompt, int(rng.integers(6, 33)))
        elif kind == 1:
            rejected = list(chosen)
            for place in rng.choice(length, max(1, length // 8), replace=False):
                rejected[place] = _sample(model, prompt + rejected[:place], 1)[0]
            if rejected == chosen:
                rejected[-1] = (rejected[-1] + 1) % 2000
        else:
            rejected = other[24 : 24 + int(rng.integers(6, 33))]
        for side, completion in zip(sides, (chosen, rejected), strict=True):
            side.append((prompt + completion, [0] * len(prompt) + [1] * len(completion)))
        kinds.append(kind)
    return causal_lm_logp(model), _batch(sides), torch.tensor(kinds)


def _sample(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(torch.multinomial(logits.softmax(-1), 1)))
    return ids[len(prompt) :]


def _batch(sides: tuple[list[Any], list[Any]]) -> PairBatch:
    from rlkit2.entanglement.language_pairs import padded

    return PairBatch(padded(sides[0]), padded(sides[1]))


# --- scores, training, correlation


def all_scores(score: SequenceScore, pairs: PairBatch) -> dict[str, torch.Tensor]:
    """Every score of every pair at the present parameters."""
    count = len(pairs)
    chunks = [pairs.select(slice(i, i + 32)) for i in range(0, count, 32)]
    forward = [forward_scores(score, chunk) for chunk in chunks]
    exact = [measured_scores(score, chunk, microbatch=8)[0] for chunk in chunks]
    prepared = score.prepare(pairs)
    lengths = score.mask(prepared.chosen).sum(1), score.mask(prepared.rejected).sum(1)
    sketch = gradient_scores(pair_geometry(score, None, prepared, method="sketch", sketch_dim=256), lengths)
    joined = {name: torch.cat([one[name] for one in forward]) for name in forward[0]}
    found = {name: joined[name] for name in ("edit", "ches", "ches_mean", "head_gap", "head_ratio")}
    found |= {f"sketch {name}": sketch[name] for name in ("gap", "c_w")}
    found |= {name: torch.cat([one[name] for one in exact]) for name in exact[0]}
    return found | {"tokens of the chosen": joined["tokens_chosen"], "-log-probability": -joined["logp_chosen"]}


def train(
    score: SequenceScore, pairs: PairBatch, steps: int, rate: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """DPO on the pairs; the fall of every chosen's log-probability, in all and per token."""
    prepared = score.prepare(pairs)
    rows = prepared.rows
    with torch.no_grad():
        start = score.sums(score.params, rows)
    count, tokens = len(pairs), score.mask(prepared.chosen).sum(1)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(score.module.parameters(), rate)
    for _ in range(steps):
        chosen = torch.randperm(count, generator=generator)[:32]
        both = torch.cat([chosen, chosen + count])
        sums = score.sums(score.params, {name: x[both] for name, x in rows.items()}).chunk(2)
        loss = margin_loss("dpo", MarginInputs(*sums, *start[both].chunk(2))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        end = score.sums(score.params, rows)
    fall = (start - end)[:count].double()
    return fall, fall / tokens


def correlations(
    seeds: list[dict[str, Any]], name: str, target: str, resamples: int = 400
) -> tuple[float, float, float]:
    """Mean over seeds of Spearman's correlation, and its interval over pairs."""
    rng = np.random.default_rng(0)

    def mean(pick: Callable[[int], np.ndarray[Any, Any]]) -> float:
        values = []
        for one in seeds:
            rows = pick(len(one[target]))
            values.append(spearmanr(one["scores"][name][rows], one[target][rows]).statistic)
        return float(np.nanmean(values))

    drawn = [mean(lambda n: rng.integers(0, n, n)) for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return mean(np.arange), float(low), float(high)


def within(seeds: list[dict[str, Any]], name: str, target: str) -> float:
    """Mean over seeds and kinds of pairs of the correlation inside a kind."""
    found = []
    for one in seeds:
        for kind in np.unique(one["kinds"]):
            rows = one["kinds"] == kind
            if np.ptp(one["scores"][name][rows]) > 0:
                found.append(spearmanr(one["scores"][name][rows], one[target][rows]).statistic)
    return float(np.mean(found)) if found else float("nan")


def table(model: str, seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per score."""
    rows = []
    for name in seeds[0]["scores"]:
        row: dict[str, Any] = {"model": model, "score": name}
        for target in ("fall", "per token"):
            value, low, high = correlations(seeds, name, target)
            inside = round(within(seeds, name, target), 2)
            row |= {target: f"{value:.2f} [{low:.2f}, {high:.2f}]", f"{target}, within kinds": inside}
        rows.append(row)
    return rows


def memory(pairs: int, tokens: int, vocabulary: int = 50_257) -> list[dict[str, Any]]:
    """Time and peak memory of `rank_pairs` on pairs of that many tokens (half of them completion), the worst 20 measured exactly."""
    import resource
    import tempfile
    import time

    import tokenizers
    import transformers

    from rlkit2.entanglement.model_folder import ModelFolder
    from rlkit2.studies.pair_ranking import rank_pairs

    config = transformers.GPT2Config(vocab_size=vocabulary, n_positions=tokens, n_embd=64, n_layer=2, n_head=4)
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    rng = np.random.default_rng(0)

    def text(count: int) -> str:
        return "".join(f" w{i}" for i in rng.integers(0, vocabulary, count))

    examples = [
        {"prompt": text(tokens // 2)[1:], **{s: text(tokens // 2) for s in ("chosen", "rejected")}}
        for _ in range(pairs)
    ]
    with tempfile.TemporaryDirectory() as folder:
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
        model = ModelFolder.load(folder)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        rank_pairs(model, examples, Path(folder, "ranked.jsonl"), exact=20)
        seconds, after = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [
        {
            "pairs": pairs,
            "tokens": tokens,
            "processor seconds": seconds,
            "MB before": before / 1024,
            "MB at most": after / 1024,
        }
    ]


def main() -> None:
    """Run and print; the table so far is written after every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("toy", "real"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=240)
    parser.add_argument("--steps", type=int, default=200, help="of DPO")
    parser.add_argument("--fit-steps", type=int, default=1200, help="of the real model")
    parser.add_argument(
        "--memory", type=int, nargs=2, metavar=("PAIRS", "TOKENS"), help="measure the ranking of a dataset instead"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory:
        report("entanglement_ranking_memory", memory(*given.memory))
        return
    for model, rate in (("toy", 1e-5), ("real", 2e-5)):
        if given.only not in (None, model):
            continue
        seeds: list[dict[str, Any]] = []
        for seed in range(given.seeds):
            score, pairs, kinds = toy(seed, given.pairs) if model == "toy" else real(seed, given.pairs, given.fit_steps)
            scores = {name: x.numpy() for name, x in all_scores(score, pairs).items()}
            fall, per_token = train(score, pairs, given.steps, rate, seed)
            fell = f"the chosen fell for {float((fall > 0).double().mean()):.0%} of pairs, by {fall.mean():.2f} nats on average"
            print(f"{model}, seed {seed}: {fell}", file=sys.stderr, flush=True)
            seeds.append(
                {"scores": scores, "fall": fall.numpy(), "per token": per_token.numpy(), "kinds": kinds.numpy()}
            )
            facts = {"seeds": len(seeds), "pairs": given.pairs, "steps": given.steps, "rate": rate, "last": fell}
            report(f"entanglement_ranking_{model}", table(model, seeds), **facts)


if __name__ == "__main__":
    main()
