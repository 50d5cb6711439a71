"""The trainer owns time, randomness and files; agents own the learning."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlkit2.errors import EpisodeError, Preempted, RunError, first_line
from rlkit2.files import WriteError
from rlkit2.nn import fast_matmul
from rlkit2.nn.encoders import can_be_rebuilt
from rlkit2.processes import PREEMPTING
from rlkit2.training.checkpoints import Checkpoint, newest_checkpoint, prune_checkpoints, save_checkpoint, set_aside
from rlkit2.training.groups import SeedGroup, advance_groups, one_intraop_thread, seed_groups
from rlkit2.training.loggers import Logger
from rlkit2.training.options import TrainingOptions
from rlkit2.training.ownership import Owner, TakenOverError
from rlkit2.training.progress import Progress
from rlkit2.training.run import Run, agent_state, describe_start, fitting, group_state
from rlkit2.training.run_files import JsonLines
from rlkit2.training.schemas import check_facts
from rlkit2.training.selection import SCORE, Goal, StopRule, mean_over, score_lines

if TYPE_CHECKING:
    from rlkit2.agents.base import Agent
    from rlkit2.data.dataset import TransitionDataset
    from rlkit2.nn.policy import Policy

AgentFactory = Callable[[Sequence[int], "torch.device | str"], "Agent"]
Evaluator = Callable[["Policy", int], Sequence[Mapping[str, Any]]]
GROWING = ("metrics", "evaluations")
SETTLED = 1000  # updates after which, or after a tenth of a shorter run, signs of trouble are more than a bumpy start


class Trainer:
    """Trains the seeds of a run to its last step, from wherever its newest checkpoint stands.

    The run goes from one synchronisation point (log, evaluation, checkpoint) to the next; in between nothing is asked of the
    device. A run killed at any moment and trained again ends bit for bit as if it had never been killed.

    Args:
        run: the folder; `config["seeds"]` and `config["training"]` say what to do.
        dataset: what to learn from, as the agent shall see it; None where `make_group` knows.
        make_agent: builds the agent for some of the seeds on a device.
        device: where to train.
        compile: see `updates.choose_update`.
        evaluator: the lines of `evaluations.jsonl`, one per seed in the order of the policy's seeds, for a policy at a step.
        loggers: where metrics and scores go besides the files of the run.
        progress: what the user sees.
        groups: seeds trained together by one agent; default `seed_groups`. A seed learns the same in any group up to rounding
            (vectorised sums round by where a number lies in memory), so a run keeps the groups it began with, bit for bit.
        until: stop at this step as if interrupted, but without raising anything.
        make_group: makes of an agent for some seeds what trains them; default: a `SeedGroup` of the dataset.
    """

    def __init__(
        self,
        run: Run,
        dataset: TransitionDataset | None,
        make_agent: AgentFactory,
        *,
        device: torch.device | str = "cpu",
        compile: str = "auto",
        evaluator: Evaluator | None = None,
        loggers: Sequence[Logger] = (),
        progress: Progress | None = None,
        groups: Callable[[Sequence[int], torch.device], list[tuple[int, ...]]] = seed_groups,
        until: int | None = None,
        make_group: Callable[[Agent], SeedGroup] | None = None,
    ) -> None:
        self.run = run
        self.options = TrainingOptions(**run.config["training"])
        self.seeds: list[int] = list(run.config["seeds"])
        self.device = torch.device(device)
        self.dataset = dataset
        self.make_agent = make_agent
        self.compile = compile
        self.evaluator = evaluator
        self.loggers = loggers
        self.progress = progress or Progress(None)
        self.make_groups = groups
        self.make_group = make_group or self._offline_group
        self.until = self.options.steps if until is None else min(until, self.options.steps)
        self.step = 0
        self.work = 0  # multiplications of an update's largest product, in the largest group as it began
        self.parts: list[tuple[int, ...]] = []  # the groups the run began with
        self.groups: list[SeedGroup] = []
        self.stopped: dict[int, dict[str, Any]] = {}  # seed -> step, metric, rows of its batch, last finite checkpoint
        self.frozen: dict[int, dict[str, Tensor]] = {}  # seed -> its state at that checkpoint
        self.group_facts: dict[int, Any] = {}  # seed -> what its group keeps of it besides tensors
        self.best: dict[str, Any] | None = None  # step and score of the best evaluation
        self.rule = StopRule(self.options.stop_when, self.options.patience) if self.options.stop_when else None
        self.files: dict[str, JsonLines] = {}
        self._stop = threading.Event()
        self._signal = signal.SIGINT  # what asked for the stop
        self._owner: Owner | None = None
        self._warned: set[str] = set()

    def _offline_group(self, agent: Agent) -> SeedGroup:
        assert self.dataset is not None
        return SeedGroup(agent, self.dataset, self.options.batch_size, self.device, self.compile)

    @property
    def active(self) -> list[int]:
        """Seeds that still learn."""
        return [seed for seed in self.seeds if seed not in self.stopped]

    @property
    def _ended(self) -> bool:
        """Whether a stop rule has ended the training."""
        return self.rule is not None and self.rule.ended

    def fit(self) -> None:
        """Train to the last step.

        Raises:
            KeyboardInterrupt: after SIGINT, with everything saved; `Preempted`, a kind of it, after SIGTERM, SIGUSR1 or SIGUSR2.
            RunError: a file cannot be written, or another process trains this run.
        """
        with self.run.lock(self.progress.message) as self._owner, one_intraop_thread(self.device), self._signals():
            try:
                self._start()
                began, first = time.perf_counter(), self.step
                self.progress.start(
                    self.seeds,
                    self.options.steps,
                    lambda: self.groups[0].step if self.groups else self.step,
                    self.groups[0].unit if self.groups else SeedGroup.unit,
                )
                while self.step < self.until and self.active and not self._ended:
                    target = self._next_stop()
                    with fast_matmul(self.device, self.work):
                        advance_groups(self.groups, min(target, self.until), self._stop)
                    self.step = self.groups[0].step
                    if self.step == target:
                        self._synchronise()
                    if self._stop.is_set() and self.step < self.options.steps and not self._ended:
                        self._finish("interrupted", began, first)
                        raise Preempted(self._signal) if self._signal in PREEMPTING else KeyboardInterrupt
                paused = self.active and not self._ended and self.step < self.options.steps
                self._finish("interrupted" if paused else "finished" if self.active else "failed", began, first)
            except TakenOverError:
                raise
            except WriteError as error:
                if not self.run.checkpoints:
                    raise
                mend = f"its checkpoints are intact; resume it with: {self.run.resume_command}"
                raise WriteError(f"{error}; {mend}") from error
            except EpisodeError as error:
                text = f"{error}; what was learnt before is saved, resume it with: {self.run.resume_command}"
                with suppress(RunError):
                    self._save_where_it_failed()
                    self.run.update_manifest(status="died", error=f"{type(error).__name__}: {first_line(error)}")
                raise EpisodeError(text) from error
            except Exception as error:
                with suppress(RunError):
                    self.run.update_manifest(status="died", error=f"{type(error).__name__}: {first_line(error)}")
                raise
            finally:
                self.progress.stop()
                self._close_groups()
                for growing in self.files.values():
                    growing.close()
                for logger in self.loggers:
                    logger.close()

    def _save_where_it_failed(self) -> None:
        """Save at the step at which an environment failed, where all groups are there; else the newest checkpoint stays the last one."""
        steps = {group.step for group in self.groups}
        if len(steps) == 1 and not steps & self.run.checkpoints.keys():
            self.step = steps.pop()
            self._save(interrupted=True)

    # ---- between the updates ------------------------------------------------------------------------------------------

    def _next_stop(self) -> int:
        intervals = [self.options.interval(name) for name in ("log_every", "eval_every", "checkpoint_every")]
        return min([self.options.steps, *((self.step // every + 1) * every for every in intervals if every)])

    def _due(self, name: str, step: int) -> bool:
        every = self.options.interval(name)
        return bool(every) and (step % every == 0 or step == self.options.steps)

    def _synchronise(self) -> None:
        """Log, evaluate and save what is due."""
        if self._owner is not None:
            self._owner.check()
        self._log()
        by_score = self.rule is not None and self.rule.goal.metric == SCORE
        if not by_score and self._due("checkpoint_every", self.step):
            self._judge()
        due = self._due("eval_every", self.step) or (self._ended and self.options.eval_every != 0)
        evaluate = self.evaluator is not None and bool(self.active) and due
        if evaluate:
            size = self.files["evaluations"].size
            self._evaluate()
            if by_score and self._judge():
                self.files["evaluations"].cut(size)  # the last evaluation is that of the policy that stays
                self._evaluate()
        if evaluate or self._due("checkpoint_every", self.step) or not self.active:
            self._save()

    def _log(self) -> None:
        taken = [group.metrics.take_all() for group in self.groups]
        names, _, present = taken[0]
        seeds = self.active
        values = torch.cat([values for _, values, _ in taken], dim=2).double().numpy()  # [n, K, S]
        extra = [more for group in self.groups for more in group.take_extra()]
        lines, bad = [], {}
        for index, seed in enumerate(seeds):
            finite = np.isfinite(values[:, :, index]) | ~present
            if not finite.all():
                row, column = np.argwhere(~finite)[0]
                bad[seed] = (self.groups[0].step_of(int(row), len(values)), names[column])
                continue
            columns = [np.ascontiguousarray(values[present[:, k], k, index]) for k in range(len(names))]
            lines.append(
                {
                    "step": self.step,
                    "seed": seed,
                    **{name: float(c.mean()) for name, c in zip(names, columns, strict=True) if len(c)},
                    **extra[index],
                }
            )
        self.files["metrics"].append(lines)
        if self.rule is not None and lines:
            self.rule.check([*lines[0], *([SCORE] if self.evaluator is not None else [])])
        self._tell(lines)
        self._warn(lines)
        if bad:
            self._stop_seeds(bad)

    def _warn(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Say once per run what the agent finds alarming about its metrics."""
        if self.step < min(SETTLED, self.options.steps // 10):
            return
        agent, bounds = self.groups[0].agent, self.groups[0].reward_bounds
        for line in lines:
            for name, message in agent.warnings(agent.config, {**line, **bounds}).items():
                if name not in self._warned:
                    self._warned.add(name)
                    self.progress.message(f"warning: seed {line['seed']} at step {self.step}: {message}")

    def _evaluate(self) -> None:
        assert self.evaluator is not None
        seeds = self.active
        agent = self.groups[0].agent if len(self.groups) == 1 else self._whole_agent(seeds)
        self.progress.status(f"evaluating at step {self.step}")
        try:
            rows = self.evaluator(agent.policy, self.step)
        except EpisodeError as error:
            if self.rule is not None and self.rule.goal.metric == SCORE:
                raise  # what decides is missing; the newest checkpoint is there to resume from
            self._go_on_without_scores(error)
            return
        lines = [{"step": self.step, **row, "seed": seed} for seed, row in zip(seeds, rows, strict=True)]
        self.files["evaluations"].append(lines)
        self._find_best()
        normalized = all(line.get("normalized_scores") is not None for line in lines)
        name = SCORE if normalized else "evaluation/return"
        self._tell([{"step": self.step, "seed": line["seed"], name: line[SCORE]} for line in score_lines(lines)])

    def _go_on_without_scores(self, error: EpisodeError) -> None:
        """An environment that fails costs its scores, not the training."""
        self.evaluator = None
        text = f"evaluation at step {self.step} failed, training continues without scores: {error}"
        self.run.update_manifest(warnings=[*self.run.manifest.get("warnings", []), text])
        self.progress.message(f"warning: {text}")

    def _find_best(self) -> None:
        """Compare this evaluation with the best one so far, both over the seeds that still learn."""
        score = self._value(SCORE, self.step - 1, self.step)
        if self.best is not None:
            self.best["score"] = self._value(SCORE, self.best["step"] - 1, self.best["step"])
        if Goal(SCORE, rising=True).better(score, math.nan if self.best is None else self.best["score"]):
            self.best = {"step": self.step, "score": score}

    # ---- a metric that says when to stop ------------------------------------------------------------------------------

    def _value(self, metric: str, after: int, until: int) -> float:
        """Mean of a metric over the seeds that still learn and the log lines from step `after` + 1 to `until`; read from the files, which a resume
        puts back to where they were."""
        lines = score_lines(self.run.evaluations()) if metric == SCORE else self.run.metrics()
        return mean_over(lines, metric, self.active, after, until)

    def _judge(self) -> bool:
        """Whether the training ends here by its stop rule, with the weights of an earlier checkpoint, which are taken back."""
        if self.rule is None or not self.active:
            return False
        self.rule.judge(self.step, self._value, last=self.step == self.options.steps)
        return self.rule.ended and self._take_chosen()

    def _take_chosen(self) -> bool:
        """Go back to the weights of the chosen checkpoint; False where they are those of now."""
        assert self.rule is not None
        assert self.rule.chosen is not None
        step = self.rule.chosen["step"]
        if step == self.step:
            return False
        _, others = self._states()
        states = _slices(agent_state(self.run.checkpoint(step)), self.seeds)
        self._build(states, others)
        self.progress.message(
            f"{self.options.stop_when} was best at step {step}; training ends at step {self.step} with the weights of then"
        )
        return True

    def _tell(self, lines: Sequence[Mapping[str, Any]]) -> None:
        for logger in (self.progress, *self.loggers):
            logger.log(lines)

    # ---- seeds that stop ----------------------------------------------------------------------------------------------

    def _stop_seeds(self, bad: Mapping[int, tuple[int, str]]) -> None:
        """Take seeds with a non-finite metric out of the run, back to their last finite checkpoint; the others continue."""
        state, others = self._states()
        for seed, (step, metric) in bad.items():
            rows = self.groups[0].rows_at(seed, step)
            finite_step, self.frozen[seed] = self._last_finite(seed)
            self.stopped[seed] = {
                "step": step,
                "metric": metric,
                "batch_indices": rows,
                "last_finite_checkpoint": finite_step,
            }
            self.progress.message(
                f"seed {seed} stopped: {metric} is not finite at step {step}; its weights are those of step {finite_step}"
            )
        self.run.update_manifest(stopped={str(seed): facts for seed, facts in self.stopped.items()})
        self._build(state, others)

    def _last_finite(self, seed: int) -> tuple[int, dict[str, Tensor]]:
        index = self.seeds.index(seed)
        for step in sorted(self.run.checkpoints, reverse=True):
            if self._is_interruption(step):  # a run that was not interrupted has none, and must end the same
                continue
            try:
                checkpoint = self.run.checkpoint(step)
            except RunError:  # damaged: the one before
                continue
            state = {name: tensor[index : index + 1].clone() for name, tensor in agent_state(checkpoint).items()}
            if all(bool(tensor.isfinite().all()) for tensor in state.values()):
                return step, state
        raise RunError(f"{self.run.path} has no finite checkpoint of seed {seed}")

    # ---- state --------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Build the groups, from the newest checkpoint if there is one, and leave a checkpoint behind in any case."""
        checkpoints = self.run.checkpoints
        if checkpoints:
            checkpoint, damaged = newest_checkpoint(self.run.path / "checkpoints")
            for step, text in damaged.items():
                aside = set_aside(self.run.path / "checkpoints", step)
                self.progress.message(
                    f"{text.partition(';')[0]}; it is set aside as {aside.name}, resuming from step {checkpoint.step}"
                )
            self.step, facts = checkpoint.step, checkpoint.facts
            with fitting(checkpoint, self.run.path):
                check_facts(facts, self.seeds, GROWING)
            self.stopped = {int(seed): record for seed, record in facts["stopped"].items()}
            self.best = facts["best"]
            if self.rule is not None:
                self.rule.restore(facts["rule"])
            self._warned = set(facts["warned"])
            self.group_facts = {int(seed): kept for seed, kept in facts.get("of_groups", {}).items()}
            if facts.get("device") == self.device.type:
                self.parts = [tuple(part) for part in facts["groups"]]
        self.parts = self.parts or self.make_groups(self.seeds, self.device)
        self.files = {
            name: JsonLines(self.run.path / f"{name}.jsonl", facts["sizes"][name] if checkpoints else 0)
            for name in GROWING
        }
        if checkpoints:
            with fitting(checkpoint, self.run.path):
                states = _slices(agent_state(checkpoint), self.seeds)
                self.frozen = {seed: states[seed] for seed in self.stopped}
                self._build(states, _slices(group_state(checkpoint), self.seeds))
                self._restore_metrics(checkpoint)
            self._tidy()
        else:
            self._build()
            self._save()
        if self.groups:  # else every seed has stopped
            weights = max(tensor[0].numel() for tensor in self.groups[0].agent.state_dict().values())
            self.work = weights * max(map(len, self.parts)) * self.options.batch_size
        with fast_matmul(self.device, self.work) as onednn:
            library = "oneDNN" if onednn else "torch's default"
        start = {**describe_start(str(self.device)), "matmul": library, "step": self.step}
        self.run.update_manifest(
            status="running",
            dataset=self.run.config["dataset"],
            reading={name: value for name, value in self.run.config.get("reading", {}).items() if value},
            seeds=self.seeds,
            starts=[*self.run.manifest.get("starts", []), start],
            stopped={str(seed): facts for seed, facts in self.stopped.items()},
            error=None,
        )

    def _build(
        self,
        states: Mapping[int, dict[str, Tensor]] | None = None,
        others: Mapping[int, dict[str, Tensor]] | None = None,
    ) -> None:
        """Lay out the active seeds as groups, with the given states of agents and groups or fresh ones."""
        self._close_groups()
        for part in self.parts:
            seeds = [seed for seed in part if seed not in self.stopped]
            if not seeds:
                continue
            agent = self.make_agent(seeds, self.device)
            if states is not None:
                agent.load_state_dict(_concatenated([states[seed] for seed in seeds]))
            group = self.make_group(agent)
            self.groups.append(group)
            group.step = self.step
            if others is not None:
                group.load_state(_concatenated([others[seed] for seed in seeds]), self.group_facts)
        for note in {group.note for group in self.groups if group.note}:
            self.progress.message(note)

    def _close_groups(self) -> None:
        while self.groups:
            self.groups.pop().close()

    def _states(self) -> tuple[dict[int, dict[str, Tensor]], dict[int, dict[str, Tensor]]]:
        """Every seed's agent (stopped ones as they were last finite), and of every active seed what its group keeps besides."""
        states, others = dict(self.frozen), dict[int, dict[str, Tensor]]()
        for group in self.groups:
            group.sync()
            self.group_facts |= group.facts
            states |= _slices(group.agent.state_dict(), group.agent.seeds)
            others |= _slices(group.state(), group.agent.seeds)
        return states, others

    def _save(self, *, interrupted: bool = False) -> None:
        """Write a checkpoint, then delete those that are no longer needed."""
        states, others = self._states()
        tensors = {
            f"agent.{name}": tensor for name, tensor in _concatenated([states[seed] for seed in self.seeds]).items()
        }
        some = next(iter(others.values()), {"generators": torch.Generator().get_state().unsqueeze(0)})
        silent = {name: torch.zeros_like(tensor) for name, tensor in some.items()}  # of a seed that has stopped
        tensors |= _concatenated([others.get(seed, silent) for seed in self.seeds])
        facts: dict[str, Any] = {
            "stopped": {str(seed): record for seed, record in self.stopped.items()},
            "best": self.best,
            "warned": sorted(self._warned),
            "device": self.device.type,
            "groups": self.parts,
            **({} if self.rule is None else {"rule": self.rule.facts}),
            **({"of_groups": {str(seed): kept for seed, kept in self.group_facts.items()}} if self.group_facts else {}),
        }
        if interrupted:
            taken = [group.metrics.take() for group in self.groups]
            tensors["metrics"] = torch.cat([values for _, values, _ in taken], dim=2).permute(2, 0, 1)
            facts["metrics"] = {"names": taken[0][0], "present": taken[0][2].tolist()}
        for growing in self.files.values():
            growing.sync()
        facts["sizes"] = {name: growing.size for name, growing in self.files.items()}
        save_checkpoint(self.run.path / "checkpoints", Checkpoint(self.step, tensors, facts))
        self._tidy()

    def _tidy(self) -> None:
        """What follows a checkpoint, and is made up for when a kill came in between."""
        prune_checkpoints(self.run.path / "checkpoints", self._kept())
        self.run.write_csv()

    def _kept(self) -> set[int]:
        """The last two checkpoints, the best, and those a stopped seed went back to; an interruption's own comes on top."""
        regular = [step for step in self.run.checkpoints if not self._is_interruption(step)]
        newer = {step for step in self.run.checkpoints if not regular or step > regular[-1]}
        best = {found["step"] for found in (self.best, self.rule and self.rule.chosen) if found}
        return {*regular[-2:], *newer, *best, *(record["last_finite_checkpoint"] for record in self.stopped.values())}

    def _is_interruption(self, step: int) -> bool:
        return not (self._due("checkpoint_every", step) or self._due("eval_every", step))

    def _restore_metrics(self, checkpoint: Checkpoint) -> None:
        """Take up the interval that an interruption cut in two."""
        if "metrics" not in checkpoint.tensors:
            return
        values = checkpoint.tensors["metrics"].permute(1, 2, 0)
        present = np.asarray(checkpoint.facts["metrics"]["present"], dtype=bool).reshape(values.shape[:2])
        done = 0
        for group in self.groups:
            count = len(group.agent.seeds)
            part = values[:, :, done : done + count].contiguous().to(self.device)
            group.metrics.restore(checkpoint.facts["metrics"]["names"], part, present)
            done += count

    def _whole_agent(self, seeds: Sequence[int]) -> Agent:
        states, _ = self._states()
        agent = self.make_agent(seeds, self.device)
        agent.load_state_dict(_concatenated([states[seed] for seed in seeds]))
        return agent

    def _finish(self, status: str, began: float, first: int) -> None:
        """Leave the run complete: last checkpoint, policy, table, manifest."""
        if self.step not in self.run.checkpoints:
            self._save(interrupted=True)
        config = self.run.config
        facts = {
            "spec": config["spec"],
            "dataset": config["dataset"]["id"],
            "agent": config["agent"],
            "seeds": self.seeds,
            "step": self.step,
        }
        policy = self._whole_agent(self.seeds).policy
        if can_be_rebuilt(policy.actor.network):
            policy.save(self.run.path / "policy", facts)
        else:  # nothing could rebuild it without its code
            kind = type(policy.actor.network).__name__
            self.progress.message(
                f"policy/ is not written: its network is a {kind} of your own; run.policy makes it from the checkpoint"
            )
        seconds = time.perf_counter() - began
        updates = self.groups[0].updates_before if self.groups else lambda step: step
        self.run.update_manifest(
            status=status,
            step=self.step,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(self.run.manifest.get("seconds", 0.0) + seconds, 3),
            updates_per_second=round((updates(self.step) - updates(first)) / seconds, 3) if seconds > 0 else None,
            best=self.best,
            **({} if self.rule is None else {"chosen": self.rule.chosen}),
        )
        for seed, record in self.stopped.items():
            self.progress.message(
                f"seed {seed} stopped at step {record['step']} ({record['metric']} was not finite); see manifest.json"
            )
        if status == "interrupted":
            self.progress.message(f"interrupted at step {self.step}; resume it with: {self.run.resume_command}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT, or signal by which a machine is asked for, lets the run save and stop, a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._signal = signal.Signals(number)
            self._stop.set()
            self.progress.status("saving")

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, *PREEMPTING)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _slices(state: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[int, dict[str, Tensor]]:
    """Each seed's part of a state, with a leading axis of one, in memory of its own."""
    return {seed: {name: tensor[k : k + 1].clone() for name, tensor in state.items()} for k, seed in enumerate(seeds)}


def _concatenated(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """States of several seeds as one, along the seed axis."""
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}
