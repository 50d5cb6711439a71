"""What is measured: pairs of sequences and the function that scores one of them (a log-probability or a return).

A `SequenceScore` is a module together with a function of it that returns one term per token or step; its sum is the `a` or `b` of
a margin loss. It is functional in the parameters, so gradients can be taken per pair without touching the module.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlkit2.errors import ConfigError
from rlkit2.losses.margin import MarginInputs, MarginLoss

Rows = Mapping[str, Tensor]
"""Named tensors whose first axis counts sequences."""


@dataclass(frozen=True)
class PairBatch:
    """P preference pairs: the same named tensors `[P, ...]` for the chosen and for the rejected side.

    Language models: `input_ids [P, T]`, `completion_mask [P, T]` and, where rows are padded, `attention_mask [P, T]` (T may differ
    between the sides). Segments: `observations [P, H, obs]`, `actions [P, H, act]`.
    """

    chosen: Rows
    rejected: Rows

    def __post_init__(self) -> None:
        for side in ("chosen", "rejected"):
            rows = {name: torch.as_tensor(value) for name, value in getattr(self, side).items()}
            object.__setattr__(self, side, rows)
        sizes = {len(tensor) for side in (self.chosen, self.rejected) for tensor in side.values()}
        if len(sizes) != 1:
            raise ConfigError(
                f"chosen and rejected rows disagree on the number of pairs ({sorted(sizes)}): give one row per pair and side"
            )
        if set(self.chosen) != set(self.rejected):
            raise ConfigError(
                f"chosen has {sorted(self.chosen)} but rejected {sorted(self.rejected)}: give both sides the same tensors"
            )

    def __len__(self) -> int:
        return len(next(iter(self.chosen.values())))

    def select(self, pairs: slice | Tensor) -> PairBatch:
        """Some of the pairs."""
        return PairBatch({k: v[pairs] for k, v in self.chosen.items()}, {k: v[pairs] for k, v in self.rejected.items()})

    @property
    def rows(self) -> dict[str, Tensor]:
        """Both sides in one, chosen first: `[2P, ...]`, the shorter side padded with zeros on the right."""
        return {name: _stack_padded(self.chosen[name], self.rejected[name]) for name in self.chosen}


PairLike = PairBatch | tuple[Rows, Rows] | Rows


def as_pair_batch(batch: PairLike) -> PairBatch:
    """A `PairBatch` from itself, from `(chosen, rejected)` or a mapping with these two names, from one mapping of 2P rows with the chosen
    first (TRL's collator), or from a mapping whose names end in `_w` and `_l` or begin with `chosen_` and `rejected_`.
    """
    if isinstance(batch, PairBatch):
        return batch
    if isinstance(batch, tuple | list):
        return PairBatch(*batch)
    if set(batch) == {"chosen", "rejected"}:
        return PairBatch(batch["chosen"], batch["rejected"])  # type: ignore[arg-type]
    tensors = {
        name: torch.as_tensor(value)
        for name, value in batch.items()
        if isinstance(value, Tensor | np.ndarray) and not name.startswith("ref_")
    }
    if tensors and all(name.endswith(("_w", "_l")) for name in tensors):
        sides = [{name[:-2]: x for name, x in tensors.items() if name.endswith(end)} for end in ("_w", "_l")]
        return PairBatch(*sides)
    if any(name.startswith("chosen_") for name in tensors):
        sides = [
            {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
            for start in ("chosen_", "rejected_")
        ]
        return PairBatch(*sides)
    odd = [name for name, value in tensors.items() if len(value) % 2]
    if odd or not tensors:
        raise ConfigError(
            f"{odd[0] if odd else 'the batch'} has no even number of rows: give 2P rows, the P chosen ones first"
        )
    halves = {name: value.chunk(2) for name, value in tensors.items()}
    return PairBatch({k: v[0] for k, v in halves.items()}, {k: v[1] for k, v in halves.items()})


def _stack_padded(first: Tensor, second: Tensor) -> Tensor:
    if first.ndim < 2 or first.shape[1] == second.shape[1]:
        return torch.cat([first, second])
    length = max(first.shape[1], second.shape[1])
    padded = [torch.cat([x, x.new_zeros(len(x), length - x.shape[1], *x.shape[2:])], 1) for x in (first, second)]
    return torch.cat(padded)


class _Bound(nn.Module):
    """`function(module, rows)` as a forward, so that `functional_call` reaches it with the module's parameters swapped."""

    def __init__(self, module: nn.Module, function: Callable[[nn.Module, Rows], Tensor]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, rows: Rows) -> Tensor:
        return self.function(self.module, rows)


@dataclass(frozen=True)
class SequenceScore:
    """A scalar score per sequence that is a sum of terms: log-probabilities of tokens, rewards or log-densities of steps.

    Calling it with `(params, item)` (one sequence, no leading axis) gives the scalar; `terms` and `sums` take rows.

    Attributes:
        module: the network.
        function: `(module, rows) -> terms [B, T]`; terms that do not count are zero.
        params: the parameters that gradients are taken of, by name; tied tensors appear once.
        mask: `rows -> [B, T]`, which terms count.
        prepare: checks rows and brings them into the form that `function` expects; run once per measurement.
        head: the output layer (language models only).
        collisions: `(module, rows) -> [B]`, sum over counted tokens of `log sum_v p(v)^2` (language models only; WPO's weights need it).
        hidden: `(module, rows) -> [B, T-1, d]`, what enters the output layer where its outputs are the logits themselves: with it the ghost method
            never holds the logits of more than one row.
    """

    module: nn.Module
    function: Callable[[nn.Module, Rows], Tensor]
    params: Mapping[str, Tensor]
    mask: Callable[[Rows], Tensor]
    prepare: Callable[[PairBatch], PairBatch] = field(default=lambda batch: batch)
    head: nn.Module | None = None
    collisions: Callable[[nn.Module, Rows], Tensor] | None = None
    hidden: Callable[[nn.Module, Rows], Tensor] | None = None

    def hidden_states(self, params: Mapping[str, Tensor], rows: Rows) -> Tensor:
        """What enters the output layer, `[B, T-1, d]`."""
        assert self.hidden is not None
        named = {f"module.{name}": value for name, value in params.items()}
        states: Tensor = functional_call(_Bound(self.module, self.hidden), named, (rows,))
        return states

    def terms(self, params: Mapping[str, Tensor], rows: Rows) -> Tensor:
        """One term per token or step, `[B, T]`."""
        named = {f"module.{name}": value for name, value in params.items()}
        terms: Tensor = functional_call(_Bound(self.module, self.function), named, (rows,))
        return terms

    def sums(self, params: Mapping[str, Tensor], rows: Rows) -> Tensor:
        """The score of every row, `[B]`."""
        return self.terms(params, rows).sum(-1)

    def __call__(self, params: Mapping[str, Tensor], item: Rows) -> Tensor:
        return self.sums(params, {name: value.unsqueeze(0) for name, value in item.items()}).squeeze(0)


def sums_of_sides(score: SequenceScore, batch: PairBatch, microbatch: int | None = None) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and the rejected of prepared pairs at the score's own parameters, `[P]` each, `microbatch` pairs at a time."""
    size = microbatch or len(batch)
    with torch.no_grad(), evaluation_mode(score.module):
        found = [
            torch.cat(
                [
                    score.sums(score.params, {name: tensor[start : start + size] for name, tensor in rows.items()})
                    for start in range(0, len(batch), size)
                ]
            )
            for rows in (batch.chosen, batch.rejected)
        ]
    return found[0], found[1]


def margin_inputs(
    score: SequenceScore,
    batch: PairBatch,
    loss: MarginLoss,
    sums: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor] | None,
) -> MarginInputs:
    """What a loss may see of these (prepared) pairs: their scores, reference scores, lengths, and what else this loss needs.

    Raises:
        ConfigError: the loss needs what only language models have.
    """
    sides = batch.chosen, batch.rejected
    more: dict[str, Tensor] = {}
    if (loss.needs_collision or loss.needs_context) and score.collisions is None:
        raise ConfigError(f"loss {loss.name} needs a language model: give a score made by causal_lm_logp")
    if loss.needs_collision and score.collisions is not None:
        with torch.no_grad(), evaluation_mode(score.module):
            found = [score.collisions(score.module, rows) for rows in sides]
        more |= {"collision_chosen": found[0], "collision_rejected": found[1]}
    if loss.needs_context:
        mask = score.mask(batch.chosen)
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        more["context_chosen"] = (places * mask).amax(1) - mask.sum(1)
    lengths = [score.mask(rows).sum(-1) for rows in sides]
    return MarginInputs(*sums, *(reference or (None, None)), *lengths, **more)


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Dropout off and every submodule's training flag restored afterwards."""
    flags = [(submodule, submodule.training) for module in modules for submodule in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for submodule, training in flags:
            submodule.training = training


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Random states, training flags, gradients and what requires them are afterwards as before, whatever happens."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    flags = [(module, module.training) for module in modules]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()] if modules else []
    devices = sorted(
        {p.device.index for p, _, _ in parameters if p.device.type == "cuda" and p.device.index is not None}
    )
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            for module, training in flags:
                module.training = training
            for p, gradient, requires in parameters:
                p.grad = gradient
                p.requires_grad_(requires)


def chosen_parameters(module: nn.Module, parameters: str | Iterable[str] = "trainable") -> dict[str, Tensor]:
    """Parameters by name: those that require gradients ("trainable"), all floating-point ones ("all"), or the named ones.

    With LoRA the first and the second differ, and so do their gradients' angles.
    """
    named: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    if parameters == "all":
        chosen = named
    elif parameters == "trainable":
        chosen = {name: p for name, p in named.items() if p.requires_grad}
    else:
        wanted = [parameters] if isinstance(parameters, str) else list(parameters)
        missing = [name for name in wanted if name not in named]
        if missing:
            raise ConfigError(f"the model has no floating-point parameter {missing[0]!r}; see model.named_parameters()")
        chosen = {name: named[name] for name in wanted}
    if not chosen:
        raise ConfigError('no parameter to take gradients of: set requires_grad or pass parameters="all"')
    return chosen


def select_parameters(params: Mapping[str, Tensor] | None, scores: Sequence[SequenceScore]) -> dict[str, Tensor]:
    """The parameters to take gradients of: the given ones (a tied tensor once, under its first name) or those of the score.

    Raises:
        ConfigError: none are known, or a name is not a parameter of the module.
    """
    if params is None:
        if not scores:
            raise ConfigError("params=None needs a score that knows its parameters, such as causal_lm_logp(model)")
        return dict(scores[0].params)
    given = {name: p for name, p in params.items() if isinstance(p, Tensor) and p.is_floating_point()}
    if scores:
        module = scores[0].module
        first = {id(p): name for name, p in reversed(list(module.named_parameters(remove_duplicate=False)))}
        canonical = {name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}
        buffers = {name for name, _ in module.named_buffers()}
        unknown = [name for name in given if name not in canonical and name not in buffers]
        if unknown:
            raise ConfigError(f"{unknown[0]!r} is not a parameter of the model; see model.named_parameters()")
        given = {canonical[name]: p for name, p in given.items() if name in canonical}
    if not given:
        raise ConfigError("no floating-point parameter to take gradients of")
    return given


# --- language models -------------------------------------------------------------------------------------------------------------


def causal_lm_logp(model: nn.Module, *, parameters: str | Iterable[str] = "trainable") -> SequenceScore:
    """Summed log-probability of the completion under a causal language model.

    The model is called on `input_ids [B, T]` and returns logits `[B, T, V]`, bare or as `.logits` (transformers). Rows are moved to
    right padding, where a causal model needs no attention mask.

    Args:
        model: any causal language model; its parameters are never written.
        parameters: "trainable", "all" or names.
    """
    known = _forward_arguments(model)
    config = getattr(model, "config", None)

    def outputs(module: nn.Module, rows: Rows) -> Tensor:
        ids = rows["input_ids"]
        # explicit position rows keep the sequences apart in every layer; the cache would only cost memory
        arguments: dict[str, Any] = {"input_ids": ids} if "input_ids" in known else {}
        if "position_ids" in known:
            arguments["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        if "use_cache" in known:
            arguments["use_cache"] = False
        if "attention_mask" in known and getattr(config, "pad_token_id", None) is not None:
            # without a mask such models look through the ids for padding, which vmap does not allow; all rows begin with their tokens.
            # Made of the shape alone: a mask that depends on the ids would be looked through too
            arguments["attention_mask"] = torch.ones(ids.shape, dtype=torch.long, device=ids.device)
        output = module(**arguments) if "input_ids" in known else module(ids)
        logits: Tensor = getattr(output, "logits", output)[:, :-1]
        return logits

    def log_probabilities(module: nn.Module, rows: Rows) -> Tensor:
        logits = outputs(module, rows)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.log_softmax(-1)

    def function(module: nn.Module, rows: Rows) -> Tensor:
        logp = log_probabilities(module, rows).gather(-1, rows["input_ids"][:, 1:].unsqueeze(-1)).squeeze(-1)
        return logp * rows["completion_mask"][:, 1:].to(logp.dtype)

    def collisions(module: nn.Module, rows: Rows) -> Tensor:
        squares = (2 * log_probabilities(module, rows)).logsumexp(-1)
        return (squares * rows["completion_mask"][:, 1:].to(squares.dtype)).sum(-1)

    any_model: Any = model
    head = (
        any_model.get_output_embeddings()
        if hasattr(model, "get_output_embeddings")
        else getattr(model, "lm_head", None)
    )

    def hidden(module: nn.Module, rows: Rows) -> Tensor:
        with _passing_on(head):
            return outputs(module, rows)

    return SequenceScore(
        module=model,
        function=function,
        params=chosen_parameters(model, parameters),
        hidden=hidden if _gives_logits(head, config) else None,
        mask=lambda rows: rows["completion_mask"][:, 1:].bool(),
        prepare=lambda batch: PairBatch(
            _right_padded(batch.chosen, "chosen", config), _right_padded(batch.rejected, "rejected", config)
        ),
        head=head,
        collisions=collisions,
    )


def _gives_logits(head: Any, config: Any) -> bool:
    """Whether the outputs of the output layer are the logits, neither scaled nor capped."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = (
        [name for name in vars(text) if "softcap" in name or "logit_scal" in name or "logits_scal" in name]
        if text
        else []
    )
    return type(head) is nn.Linear and all(getattr(text, name) in (None, 1, 1.0) for name in names)


@contextmanager
def _passing_on(layer: Any) -> Iterator[None]:
    """For the time of a forward pass the layer returns what it is given."""
    own = vars(layer).get("forward")
    layer.forward = lambda x: x
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def _forward_arguments(model: nn.Module) -> frozenset[str]:
    any_model: Any = model
    base = any_model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(base.forward).parameters)


def _right_padded(rows: Rows, side: str, config: Any = None) -> dict[str, Tensor]:
    """`input_ids` and `completion_mask` with every row's padding on the right and no column that is padding everywhere."""
    for name in ("input_ids", "completion_mask"):
        if name not in rows:
            raise ConfigError(
                f"{side} rows have no {name}: a language-model pair needs input_ids and completion_mask [P, T]"
            )
    ids, completion = rows["input_ids"], rows["completion_mask"].long()
    if "attention_mask" not in rows:
        _refuse_left_padding(ids, side, config)
    attended = rows["attention_mask"].long() if "attention_mask" in rows else torch.ones_like(ids)
    attended = attended | completion
    order = attended.argsort(dim=1, descending=True, stable=True)
    length = int(attended.sum(1).max())
    ids, completion = (x.gather(1, order)[:, :length] for x in (ids, completion))
    empty = (completion[:, 1:].sum(1) == 0).nonzero().flatten()
    if len(empty):
        raise ConfigError(
            f"{side} completion of pair {int(empty[0])} is empty: drop the pair or check the completion mask"
        )
    return {"input_ids": ids, "completion_mask": completion}


def _refuse_left_padding(ids: Tensor, side: str, config: Any) -> None:
    """Without an attention mask, tokens in front count as context: refuse rows that begin as padded ones do."""
    starts = (ids == ids[:, :1]).long().cumprod(1).sum(1)  # how often each row's first token stands at its beginning
    pad, bos = (getattr(config, name, None) for name in ("pad_token_id", "bos_token_id"))
    if pad is not None:
        suspect = (ids[:, 0] == pad) & ((starts > 1) | torch.tensor(pad != bos, device=ids.device))
    else:  # the padding token is not known: rows of different runs of the 0 that arrays are commonly padded with
        runs = torch.where(ids[:, 0] == 0, starts, 0)
        suspect = (runs > 1) & (runs != runs.min())
    if bool(suspect.any()):
        row = int(suspect.long().argmax())
        raise ConfigError(
            f"{side} row {row} begins with token {int(ids[row, 0])} as if padded on the left, and no attention_mask says so: give attention_mask"
        )


def sequence_reward(model: nn.Module, *, parameters: str | Iterable[str] = "trainable") -> SequenceScore:
    """The scalar score of a sequence-classification model with one label (TRL's reward models): rows `input_ids`, `attention_mask`."""

    def function(module: nn.Module, rows: Rows) -> Tensor:
        logits: Tensor = module(
            input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False
        ).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    return SequenceScore(
        model,
        function,
        chosen_parameters(model, parameters),
        lambda rows: torch.ones_like(rows["input_ids"][:, :1]).bool(),
    )


# --- trajectory segments ---------------------------------------------------------------------------------------------------------


def _segment_rows(batch: PairBatch) -> PairBatch:
    for name in ("observations", "actions"):
        if name not in batch.chosen:
            raise ConfigError(f"segments have no {name}: give observations [P, H, obs] and actions [P, H, act]")
    lengths = [side["actions"].shape[1] for side in (batch.chosen, batch.rejected)]
    if lengths[0] != lengths[1]:
        raise ConfigError(
            f"segments have {lengths[0]} and {lengths[1]} steps: sums are comparable at equal lengths only, cut both to one length"
        )
    for side, rows in (("chosen", batch.chosen), ("rejected", batch.rejected)):
        for name, tensor in rows.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ConfigError(f"{name} of the {side} segments hold NaN or infinite values: clean the data first")
    return batch


def _step_mask(rows: Rows) -> Tensor:
    return torch.ones(rows["actions"].shape[:2], dtype=torch.bool, device=rows["actions"].device)


def segment_return(
    model: nn.Module, *, reduce: str = "sum", parameters: str | Iterable[str] = "trainable"
) -> SequenceScore:
    """Predicted return of a segment: the "sum" or "mean" of a reward model over steps.

    The model takes `(observations, actions)`, or their concatenation where its forward has a single argument, and returns rewards
    `[B, H]` or `[B, H, 1]`.
    """
    if reduce not in ("sum", "mean"):
        raise ConfigError(f'reduce={reduce!r} of segment_return must be "sum" or "mean"')
    single = len(_forward_arguments(model)) == 1

    def function(module: nn.Module, rows: Rows) -> Tensor:
        parts = rows["observations"], rows["actions"]
        rewards: Tensor = module(torch.cat(parts, -1)) if single else module(*parts)
        rewards = rewards.reshape(parts[1].shape[:2])
        return rewards if reduce == "sum" else rewards / rewards.shape[1]

    return SequenceScore(model, function, chosen_parameters(model, parameters), _step_mask, _segment_rows)


def segment_logp(
    policy: nn.Module, discount: float = 1.0, *, parameters: str | Iterable[str] = "trainable"
) -> SequenceScore:
    """Discounted sum of action log-densities, `sum_t discount^t log pi(a_t|s_t)`, as in contrastive preference learning.

    The policy has `log_prob(observations, actions) -> [B, H]`, or is called on observations and returns a distribution.
    """
    if not 0.0 < discount <= 1.0:
        raise ConfigError(f"discount={discount} must be in (0, 1]")

    def function(module: Any, rows: Rows) -> Tensor:
        observations, actions = rows["observations"], rows["actions"]
        logp = (
            module.log_prob(observations, actions)
            if hasattr(module, "log_prob")
            else module(observations).log_prob(actions)
        )
        logp = logp.sum(-1) if logp.ndim == 3 else logp
        powers = discount ** torch.arange(logp.shape[1], dtype=logp.dtype, device=logp.device)
        weighted: Tensor = logp * powers
        return weighted

    return SequenceScore(policy, function, chosen_parameters(policy, parameters), _step_mask, _segment_rows)
