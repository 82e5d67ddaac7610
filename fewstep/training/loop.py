"""The training loop that every method shares: backward, reduction, clipping, update, average, log, checkpoint, resume.

There is no DDP wrapper: the turns of one step touch different parameters, which DDP rejects. The loop sums a turn's
gradients over processes itself. Between two logged steps the host reads nothing from the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.config.run import RunConfig
from fewstep.data.batch import Batch, Stream
from fewstep.errors import Interrupted, UserError
from fewstep.networks.roles import FOLLOWERS, Role
from fewstep.training import checkpoint
from fewstep.training.averages import Average, averages_of
from fewstep.training.best import Best
from fewstep.training.counters import counters
from fewstep.training.distributed import Processes
from fewstep.training.guard import Guard
from fewstep.training.held import Holding
from fewstep.training.method import Method, Order, StagedMethod, TargetMethod, Turn
from fewstep.training.monitor import Monitor
from fewstep.training.optimization import Faults, RoleOptimizer
from fewstep.training.orders import carry_out
from fewstep.training.shares import Share, refuse_other_batch
from fewstep.training.stopping import Stopping
from fewstep.training.verdict import Trouble
from fewstep.training.watch import Watch

logger = logging.getLogger("fewstep")


class Loop:
    """Runs a method from its last checkpoint (or from step 0) to ``config.max_steps``.

    Args:
        method: whose turns are played.
        method_name: kept in checkpoints, so that no other method goes on from them.
        config: of the run.
        batches: what it trains on.
        processes: this process among all.
        monitor: log, progress bar and trackers; it acts on the main process only.
        on_samples: called with the number of steps done, on the main process, when samples are due; it says how they
            vary, for the log. Where the processes work together, it is called on all of them. What it is called with
            besides, it calls between two network calls: the run may have to stop there.
        on_evaluation: called on all processes, as often with the same pauses, when an evaluation is due; it gives its
            numbers, the same on each.
        best: which evaluation was the best so far; default none is made.
        holding: how the processes hold the roles; default whole.
    """

    def __init__(
        self,
        method: Method,
        method_name: str,
        config: RunConfig,
        *,
        batches: Stream,
        processes: Processes,
        monitor: Monitor,
        on_samples: Callable[[int, Callable[[], None]], dict[str, float]],
        on_evaluation: Callable[[Callable[[], None]], dict[str, float]] = lambda _pause: {},
        best: Best | None = None,
        holding: Holding | None = None,
    ) -> None:
        self.method, self.method_name, self.config, self.batches = method, method_name, config, batches
        self.device, self.processes, self.monitor, self.on_samples = batches.device, processes, monitor, on_samples
        self.on_evaluation, self.holding = on_evaluation, holding or Holding()
        self.best = best or Best(Path(config.out), None, 0, processes)
        self.checkpoints = Path(config.out) / "checkpoints"
        self.faults = Faults(halting=config.stop_on != "never")
        trainable = (role for role in method.roles.values() if role.parameters())
        self.optimizers = {
            role.name: RoleOptimizer(
                role, config, method.learning_rate(role.name), self.faults, self.holding.held(role)
            )
            for role in trainable
        }
        self.followers = averages_of(method.roles, self.optimizers["student"].held, self.holding.here)
        self.share = Share.of(config, processes.count)
        self._batch_state = self.share.state()
        self.watch = Watch(config, self.checkpoints, processes)
        how = (self._here, self._batches, not self.holding.together)
        self.guard = Guard(method, self.optimizers, self.faults, processes, *how)
        self.step = 0
        #: The numbers of this step, where it was left before its student was looked at; they are logged together.
        self._owed: dict[str, float] | None = None
        self._kept = -1  # the step of the newest checkpoint that this process knows to be whole
        self.stopping = Stopping(processes)
        self._recent: dict[str, Tensor] = {}

    def run(self) -> None:
        """Train to the last step, or until there was no better evaluation for long enough.

        Raises:
            Interrupted: after a signal.
            UserError: something went wrong on which the run is to end (``--stop_on``), and no roll-back is left.
        """
        with self.stopping.noted():
            if self._kept < 0:
                self._refuse_start()
                self.monitor.resume(-1)  # of a run that was killed here, or whose checkpoints were taken away
                self.best.resume(None, -1)
                if self.config.eval_steps:
                    self._owed = {}  # the student as it begins is looked at first
                else:
                    self._save()
            else:  # a kill may have come before the ones that are too many were removed
                limit = self.config.checkpoints_total_limit
                self._on_main_process(lambda: checkpoint.keep_newest(self.checkpoints, self.step, limit))
            while self._owed is not None or (self.step < self.config.max_steps and not self.best.enough):
                owed = self._owed is not None
                numbers, self._owed = self.one_step() if self._owed is None else self._owed, None
                stopping = self.stopping.agreed()
                last = self.step == self.config.max_steps
                saving = last or stopping or self.step % self.config.checkpointing_steps == 0
                sampling, evaluating = self._due(self.config.sample_steps, 1), self._due(self.config.eval_steps, 0)
                looking = sampling or evaluating
                trouble = self.guard.look(self.step) if numbers or saving or looking else None
                if trouble is None and looking:
                    seen = None if stopping else self._see_student(sampling, evaluating)
                    if seen is None:  # whoever goes on looks first
                        self._owed = numbers
                        self._save()
                        raise Interrupted
                    numbers |= seen
                if trouble is None and (numbers or looking):
                    self.monitor.log(self.step, numbers)
                    trouble = self.watch.look({"step": self.step, **numbers})
                    if trouble is not None and trouble.kind == "nan":
                        trouble = self.guard.traced(trouble, self.step)
                if trouble is not None:
                    self._end_or_go_back(trouble)
                    continue
                improved = evaluating and self.best.note(self.step, numbers)
                if owed and evaluating:
                    self._kept = -1  # that checkpoint knows nothing of its evaluation
                if saving or owed or improved or self.best.enough:
                    self._save()
                self._keep(improved)
                if stopping:
                    raise Interrupted
        self.monitor.close()
        if self.step < self.config.max_steps and self.processes.rank == 0:
            logger.info("%s", self.best.why_enough(self.step, self.config.max_steps))

    def resume(self, found: checkpoint.Found | None = None) -> None:
        """Go on from a checkpoint.

        Args:
            found: the checkpoint, where the processes agreed on one; default: the newest whole one.

        Raises:
            UserError: there is none, or it is of another method.
        """
        found = found or checkpoint.find_latest(self.checkpoints)
        state = counters(found)
        if state["method"] != self.method_name:
            raise UserError(
                f"{self.checkpoints} was written by {state['method']}, not {self.method_name}; choose another --out"
            )
        refuse_other_batch(Path(self.config.out), state, self.share)
        self._batch_state = state.get("batch", self._batch_state)
        tensors = self.holding.tensors(found, self.method.roles)
        absent = {"unlogged", *self._held()} - tensors.keys() | self.optimizers.keys() - state["renewed_at"].keys()
        if absent:
            raise UserError(f"{found.folder} holds nothing of {', '.join(sorted(absent))}; choose another --out")
        for name, role in self.method.roles.items():
            if name in tensors:
                role.load_state_dict(tensors[name])
        self._owed = state.get("owed")
        self.watch.resume(self.monitor.resume(state["step"] - (self._owed is not None)))
        self.faults.clear()
        for name, optimizer in self.optimizers.items():
            optimizer.load_state(tensors[f"{name}_optimizer"])
            optimizer.renewed_at = state["renewed_at"][name]
            optimizer.slowed = self.watch.slowed
        self._recent = {name: value.to(self.device) for name, value in tensors["unlogged"].items()}
        self.step = self._kept = state["step"]
        self.best.resume(state.get("evaluation"), self.step)
        if self._owed is not None:
            self.monitor.advance(self.step)

    # --- one step -----------------------------------------------------------------------------------------------

    def one_step(self) -> dict[str, float]:
        """Play one step. Returns what there is to log of it: nothing in most steps."""
        logging = (
            (self.step + 1) % self.config.log_steps == 0 or self.step + 1 == self.config.max_steps or self.step == 0
        )
        turns = [self.method.turns(self.step, batch) for batch in self._batches(self.step, logging)]
        part = 1 / (self.share.micro_batches * self.processes.count)
        # What a turn reports stays until the next logged step: a student that moves every fifth step is logged too.
        log: dict[str, Tensor] = {}
        while (turn := self._advance(turns, part, log)) is not None:
            if not isinstance(turn, Turn):
                carry_out(turn, self.method.roles, self.optimizers, self.holding.here, self.step)
                continue
            averages = self._averages() if turn.role == "student" else []
            if isinstance(self.method, StagedMethod):
                self.optimizers[turn.role].lr = self.method.learning_rate_at(turn.role, self.step)
            log[f"{turn.role}/gradient_norm"] = self.optimizers[turn.role].update(self.step, averages)
        self._recent.update(log)
        self.step += 1
        self.monitor.advance(self.step)
        if not logging:
            return {}
        means = self._means_over_processes(self._recent)
        self._recent = {}
        values = torch.stack([value.detach().float().to(self.device) for value in means.values()])
        return dict(zip(means, values.tolist(), strict=True))

    def _advance(self, turns: list[Iterator[Turn | Order]], part: float, log: dict[str, Tensor]) -> Turn | Order | None:
        """Play the next turn of every micro-batch; their gradients add up in the parameters."""
        played: Turn | Order | None = None
        for micro, generator in enumerate(turns):
            turn = next(generator, None)
            if micro and (type(turn), getattr(turn, "role", None)) != (type(played), getattr(played, "role", None)):
                raise RuntimeError(f"micro-batches left their lockstep: {turn} after {played}")
            if isinstance(turn, Turn):
                self._backward(turn, part)
                for name, value in turn.log.items():
                    log[name] = log.get(name, 0) + value.detach() / len(turns)
            played = turn
        return played

    def _backward(self, turn: Turn, part: float) -> None:
        tensors = [tensor for tensor, _ in turn.backward]
        gradients = [torch.ones_like(t) * part if g is None else g.to(t.dtype) * part for t, g in turn.backward]
        # inputs= keeps the gradients of the other roles None, and skips the work of computing them.
        torch.autograd.backward(tensors, gradients, inputs=self.optimizers[turn.role].held.leaves)

    def _batches(self, step: int, logging: bool = False) -> Iterator[Batch]:
        """The micro-batches of a step on this process."""
        for micro in range(self.share.micro_batches):
            indices = self.share.indices(self.processes.rank, micro)
            yield self.batches.micro_batch(self.watch.seed, step, indices, self.share.samples, logging)

    def _averages(self) -> list[tuple[Average, float]]:
        """What follows the student, each with the decay of this step."""
        decays = {"ema": self.config.ema_decay}
        if "target" in self.followers:
            assert isinstance(self.method, TargetMethod)  # the contract of a method with this role
            decays["target"] = self.method.target_decay(self.step)
        return [(average, decays[name]) for name, average in self.followers.items()]

    def _due(self, every: int, first: int) -> bool:
        """Whether what is done every so many steps from the ``first``, and after the last, is to be done now."""
        return every > 0 and first <= self.step and (self.step % every == 0 or self.step == self.config.max_steps)

    # --- between steps ------------------------------------------------------------------------------------------

    def _refuse_start(self) -> None:
        if (trouble := self.guard.look(0)) is not None:
            raise UserError(f"{trouble.words}: no run can start from that")

    def _keep(self, improved: bool) -> None:
        if improved:
            self._on_main_process(self.best.keep)

    def _end_or_go_back(self, trouble: Trouble) -> None:
        found = self.watch.way_back(trouble, self.step)
        if found is not None:
            self.resume(found)
            return
        raise UserError(
            f"{trouble.words}; stopped with the checkpoint of step {self._kept} kept: --resume --rollbacks "
            f"{len(self.watch.rollbacks) + 1} goes back to the last good one, and on with lower learning rates"
        )

    def _save(self) -> None:
        if self._kept == self.step:
            return
        # One process writes for all, and each that goes on has then what they had on average.
        self._recent = self._means_over_processes(self._recent)
        self._on_main_process(self._write_checkpoint, self.holding.together)
        self._kept = self.step

    def _held(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of a checkpoint, by file and name."""
        roles = self.method.roles.items()
        held = (*self.optimizers, *FOLLOWERS)
        tensors = {name: role.state_dict() for name, role in roles if name in held or role.kept}
        return tensors | {f"{name}_optimizer": optimizer.state() for name, optimizer in self.optimizers.items()}

    def _write_checkpoint(self) -> None:
        self.monitor.flush()
        tensors = self._held()
        tensors["unlogged"] = self._recent  # a resumed run's next line says what an undisturbed run's would
        state = {
            "method": self.method_name,
            "processes": self.processes.count,
            "batch": self._batch_state,
            "renewed_at": {name: optimizer.renewed_at for name, optimizer in self.optimizers.items()},
            **({} if self._owed is None else {"owed": self._owed}),
            "evaluation": self.best.state(),
        }
        self.holding.save(self.checkpoints, self.step, tensors, state, self.config.checkpoints_total_limit)

    def _means_over_processes(self, log: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.processes.count == 1 or not log:
            return log
        names = sorted(log)  # methods may fill their logs in another order on each process
        values = torch.stack([log[name].detach().float().to(self.device) for name in names])
        dist.all_reduce(values)
        means = dict(zip(names, values / self.processes.count, strict=True))
        return {name: means[name] for name in log}

    def _see_student(self, sampling: bool, evaluating: bool) -> dict[str, float] | None:
        """What there is to log of the student as it is, on the main process at least; None: the run is to stop."""
        numbers: dict[str, float] = {}
        samples, evaluation, pause = self.on_samples, self.on_evaluation, self.stopping.pause
        try:
            if sampling:
                self.stopping.of_main(lambda: numbers.update(samples(self.step, pause)), self.holding.together)
            if evaluating:
                self.stopping.of_main(lambda: numbers.update(evaluation(pause)), together=True)
        except Interrupted:
            return None
        return numbers

    def _here(self) -> dict[str, dict[str, Tensor]]:
        """What :meth:`_held` says, as far as it lies on this process."""
        held = self._held().items()
        return {stem: {name: self.holding.here(v) for name, v in values.items()} for stem, values in held}

    def _on_main_process(self, action: Callable[[], None], together: bool = False) -> None:
        if self.processes.rank == 0 or together:
            action()
        if self.processes.count > 1:
            dist.barrier()


def sampling_role(roles: dict[str, Role]) -> Role:
    """The role that is sampled, evaluated and exported: the student's average where there is one."""
    return roles.get("ema", roles["student"])
