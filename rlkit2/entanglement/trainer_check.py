"""Does the trainer's own loss have the coefficients that are claimed for it? Listens to one forward and backward pass of training.

The gradient that arrives at a token's log-probability is the vector-Jacobian product of the trainer's loss with respect to it, so its mean over a
completion is `-d_w / P` for a chosen and `d_l / P` for a rejected one. Listening changes no number of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlkit2.entanglement.language_pairs import IGNORED
from rlkit2.entanglement.scores import PairBatch, as_pair_batch, untouched
from rlkit2.losses.margin import MarginInputs, MarginLoss

TOLERANCE = 0.02
"""Relative difference that counts as agreement in float32; half-precision training is allowed `HALF_TOLERANCE`."""
HALF_TOLERANCE = 0.15


class CoefficientCheck:
    """What one microbatch of training shows about the trainer's loss.

    Args:
        model: the module that is trained; one forward hook is put on it until the first pass with gradients.
        sides: equal parts that its batches consist of: 2 for chosen and rejected, 3 with a gold completion of each pair behind them (which is
            not compared), 1 for single rows that are wanted or unwanted (KTO).
        mismatched: the trainer scores mismatched completions of the batch just before, for KTO's reference point.
    """

    def __init__(self, model: torch.nn.Module, sides: int = 2, *, mismatched: bool = False) -> None:
        self._model, self._sides, self._mismatched = model, sides, mismatched
        self._handle: Any = model.register_forward_hook(self._listen, with_kwargs=True)
        self._kept: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}  # the last pass without gradients: the mismatched completions
        self._half = False
        self.error: Exception | None = None

    def close(self) -> None:
        """Stop listening."""
        self._handle.remove()

    def _listen(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self.error is None:
            self._guarded(self._forward, args, kwargs, output)

    def _guarded(self, listen: Callable[..., None], *heard: Any) -> None:
        """A fault while listening is kept for `compare`: it touches neither this pass nor what comes after."""
        try:
            with untouched(self._model):
                listen(*heard)
        except Exception as error:  # noqa: BLE001
            self.error = error

    def _forward(self, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        watched = getattr(output, "log_probs", None)
        watched = getattr(output, "logits", None) if watched is None else watched
        if self._mismatched and not torch.is_grad_enabled() and isinstance(watched, Tensor):
            self._before = {"logps": watched.detach(), **{name: kwargs[name] for name in ("attention_mask", "labels")}}
            self._before["ids"] = kwargs["input_ids"]
        if not (
            torch.is_grad_enabled()
            and isinstance(watched, Tensor)
            and watched.requires_grad
            and isinstance(ids, Tensor)
        ):
            return
        self.close()
        self._kept["ids"] = ids.detach()
        for name, value in (*kwargs.items(), ("collision", getattr(output, "log_sum_sq_probs", None))):
            if name in ("attention_mask", "labels", "margin", "collision") and isinstance(value, Tensor):
                self._kept[name] = value.detach()
        device = watched.device.type
        self._half = watched.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device)
        keep = self._keep_tokens if watched is getattr(output, "log_probs", None) else self._keep_logits
        values = watched.detach()
        watched.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: self._guarded(keep, values, gradient.detach())
        )

    def _keep_tokens(self, values: Tensor, gradient: Tensor) -> None:
        count = self._kept["ids"].shape[1] - 1
        self._kept |= {"logps": values[:, -count:].float(), "gradient": gradient[:, -count:].float()}

    def _keep_logits(self, values: Tensor, gradient: Tensor) -> None:
        if values.ndim == 2:  # scores of a reward model
            self._kept |= {"logps": values.float(), "gradient": gradient.float()}
            return
        logps, slopes = [], []
        for z, dz, ids in zip(values[:, :-1], gradient[:, :-1], self._kept["ids"][:, 1:], strict=True):
            logp = z.float().log_softmax(-1)
            residual = -logp.exp()
            residual[torch.arange(len(ids), device=ids.device), ids] += 1  # dlogp/dz = e - p
            logps.append(logp.gather(-1, ids[:, None])[:, 0])
            slopes.append((dz.float() * residual).sum(-1) / residual.square().sum(-1).clamp(min=1e-30))
        self._kept |= {"logps": torch.stack(logps), "gradient": torch.stack(slopes)}

    def compare(
        self,
        loss: MarginLoss,
        reference: Callable[[PairBatch], tuple[Tensor, Tensor] | None],
        *,
        scale: float,
    ) -> dict[str, Any] | None:
        """Claimed and real coefficients of the pairs of the microbatch; None where it cannot be told.

        Args:
            loss: what the trainer is said to minimise.
            reference: reference scores of these pairs.
            scale: what the trainer multiplies its loss with before the backward pass.

        Returns:
            `claimed` and `trained`: `(d_w, d_l)` as lists, `agree`: whether they are equal within the number format's error.
        """
        if self.error is not None:
            raise self.error
        if "gradient" not in self._kept or len(self._kept["ids"]) % self._sides:
            return None
        if self._sides == 1:
            return self._compare_rows(loss, reference, scale)
        logps, gradient, ids = (self._kept[name] for name in ("logps", "gradient", "ids"))
        mask = self._completions()
        if mask is None:
            return None
        pairs = len(ids) // self._sides
        logps, gradient, mask = (x[: 2 * pairs] for x in (logps, gradient, mask))
        trained = (gradient * mask).sum(1) / mask.sum(1) * pairs / scale
        sums, lengths = (logps * mask).sum(1), mask.sum(1)
        more: dict[str, Any] = {}
        if loss.needs_context:
            attended = self._kept["attention_mask"][:pairs].sum(1) - 1
            more["context_chosen"] = attended - lengths[:pairs]
        if loss.needs_collision:
            if "collision" not in self._kept:
                return None
            found = (self._kept["collision"][:, -mask.shape[1] :].float() * mask).sum(1)
            more |= {"collision_chosen": found[:pairs], "collision_rejected": found[pairs:]}
        sides = sums.chunk(2)
        given = reference(self._pairs(mask)) if loss.needs_reference else None
        if loss.needs_reference and given is None:
            return None
        if loss.name == "bradley_terry" and "margin" in self._kept:
            loss = loss.bind(margin=self._kept["margin"])
        claimed = loss.coefficients(MarginInputs(*sides, *(given or (None, None)), *lengths.chunk(2), **more))
        mean = (gradient * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        spread = ((gradient - mean) * mask).abs().max() * pairs / scale
        return self._verdict(claimed, (-trained[:pairs], trained[pairs:]), spread)

    def _compare_rows(
        self, loss: MarginLoss, reference: Callable[[PairBatch], tuple[Tensor, Tensor] | None], scale: float
    ) -> dict[str, Any] | None:
        """The same for rows that are each wanted or unwanted; which they are shows in the sign of what arrives."""
        logps, gradient = self._kept["logps"], self._kept["gradient"]
        mask = (self._kept["labels"][:, 1:] != IGNORED).to(gradient.dtype)
        rows = _whole(self._kept, mask)
        other = _whole(self._before, (self._before["labels"][:, 1:] != IGNORED)) if self._before else rows
        given = reference(PairBatch(rows, other))
        if given is None:
            return None
        if self._before:
            count = other["input_ids"].shape[1] - 1
            ratios = self._before["logps"][:, -count:].float().sum(1) - given[1]
            loss = loss.bind(z_ref=loss.hyperparameters["beta"] * max(0.0, float(ratios.mean())))
        sums = (logps * mask).sum(1)
        d_w, d_l = loss.coefficients(MarginInputs(sums, sums, given[0], given[0]))
        trained = (gradient * mask).sum(1) / mask.sum(1) * len(sums) / 2 / scale  # a pair has two rows
        wanted = trained < 0
        mean = (gradient * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        spread = ((gradient - mean) * mask).abs().max() * len(sums) / 2 / scale
        return self._verdict((d_w[wanted], d_l[~wanted]), (-trained[wanted], trained[~wanted]), spread)

    def _verdict(self, claimed: tuple[Tensor, Tensor], real: tuple[Tensor, Tensor], spread: Tensor) -> dict[str, Any]:
        """`spread`: the largest difference between the tokens of one completion, in units of the coefficients."""
        one, other = torch.cat(claimed), torch.cat(real)
        allowed = (HALF_TOLERANCE if self._half else TOLERANCE) * torch.cat([one, other]).abs().max()
        return {
            "claimed": [side.tolist() for side in claimed],
            "trained": [side.tolist() for side in real],
            "agree": bool((one - other).abs().max() <= allowed) and bool(spread <= allowed),
        }

    def _completions(self) -> Tensor | None:
        """`[2P, T]`, 1 where a term belongs to a completion; None where that cannot be told."""
        gradient, ids = self._kept["gradient"], self._kept["ids"]
        if gradient.shape[1] == 1:
            return torch.ones_like(gradient)
        if "labels" in self._kept:
            return (self._kept["labels"][:, 1:] != IGNORED).to(gradient.dtype)
        # trainers that keep the labels to themselves: a rejected completion is where gradients arrive, and its prompt is the chosen's
        arrives = gradient != 0
        chosen, rejected, *others = arrives.chunk(self._sides)
        if not bool(arrives.any(1).all()):
            return None
        place = torch.arange(ids.shape[1] - 1, device=ids.device)
        start = rejected.long().argmax(1, keepdim=True)
        return torch.cat([chosen & (place >= start), rejected, *others]).to(gradient.dtype)

    def _pairs(self, mask: Tensor) -> PairBatch:
        """The microbatch as pairs."""
        rows = _whole(self._kept, mask)
        return as_pair_batch({name: tensor[: 2 * (len(tensor) // self._sides)] for name, tensor in rows.items()})


def _whole(heard: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """Rows as a score takes them, from what a forward pass was called with; `mask` is of all tokens but the first."""
    ids = heard["ids"]
    if ids.shape[1] - 1 != mask.shape[1]:
        mask = torch.ones_like(ids[:, 1:])
    rows = {"input_ids": ids, "completion_mask": torch.cat([torch.zeros_like(ids[:, :1]), mask.long()], 1)}
    if "attention_mask" in heard:
        rows["attention_mask"] = heard["attention_mask"]
    return rows
