"""One role's update: sum the gradients over processes, clip, and step, without the host ever waiting for a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.config.run import RunConfig
from fewstep.kernels.adamw import adamw
from fewstep.kernels.updates import Moments, Rule
from fewstep.networks.roles import Role
from fewstep.training.averages import Average
from fewstep.training.held import Held


class Faults:
    """The first step in which a gradient was not finite, for each role of a run: noted on the device, read seldom.

    Args:
        halting: after one no role is updated any more, so that whoever looks for the cause finds the weights of then;
            else only that update is left out.
    """

    def __init__(self, halting: bool = True) -> None:
        self.halting = halting
        #: By role, () int64; -1 while there is none.
        self.first: dict[str, Tensor] = {}

    def watch(self, role: str, device: torch.device) -> None:
        """Have a place for a role."""
        self.first[role] = torch.full((), -1, dtype=torch.int64, device=device)

    def clear(self) -> None:
        """Forget what was noted, and update again."""
        for first in self.first.values():
            first.fill_(-1)

    def moving(self) -> Tensor:
        """() float32: 0 where no role is updated any more, else 1."""
        return 1 - self._any() if self.halting else torch.ones_like(self._any())

    def note(self, role: str, step: int, bad: Tensor) -> Tensor:
        """Note whether a role's gradient is bad in a step, (). Returns 1.0 where nothing is to be updated, else 0.0."""
        first = self.first[role]
        first.copy_(torch.where(bad & (first < 0), step, first))
        return self._any() if self.halting else bad.float()

    def _any(self) -> Tensor:
        return (torch.stack(list(self.first.values())) >= 0).any().float()


class RoleOptimizer:
    """AdamW for one role, which skips an update whose gradient is not finite.

    Args:
        role: whose trainable parameters are updated.
        config: of the run.
        lr: peak learning rate.
        faults: where such gradients are noted, for all roles of a run.
        held: the parameters as this process holds them; default whole.
    """

    def __init__(
        self, role: Role, config: RunConfig, lr: float, faults: Faults | None = None, held: Held | None = None
    ) -> None:
        self.role = role
        self.held = held or Held(role)
        self.faults = Faults() if faults is None else faults
        #: The learning rate is multiplied by this.
        self.slowed = 1.0
        self.lr = lr
        self.max_grad_norm = config.max_grad_norm
        self.warmup = config.lr_warmup_steps
        self.faults.watch(role.name, self.held.device)
        #: What the last update went by.
        self.rule = Rule(lr, (config.adam_beta1, config.adam_beta2), config.adam_weight_decay)
        self.moments = Moments(self.held.own)
        self.renewed_at = 0

    def renew(self, step: int) -> None:
        """Forget all momentum and warm up again from ``step``."""
        self.moments.load({})
        self.renewed_at = step

    def update(self, step: int, averages: Sequence[tuple[Average, float]] = ()) -> Tensor:
        """Reduce, clip and apply the gradients that the parameters hold, and drop them. Returns their norm, ().

        A parameter without a gradient on every process stays as it is, and so do its momenta.

        Args:
            step: of the run.
            averages: of this role, which move in the same pass, each with its decay.
        """
        gradients = self.held.reduce()
        if not gradients:
            raise RuntimeError(f"no parameter of the {self.role.name} got a gradient in step {step}")
        norm = self.held.norm(gradients)
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_grad_norm > 0 else None
        skip = self.faults.note(self.role.name, step, ~torch.isfinite(norm))
        warm = min(1.0, (step - self.renewed_at + 1) / (self.warmup + 1))
        self.rule = replace(self.rule, lr=self.lr * self.slowed * warm)
        followers = [average.follower(decay) for average, decay in averages]
        own = self.held.own
        adamw(self.moments, [p.grad for p in own], self.rule, scale=scale, skip=skip, followers=followers)
        # A fused update does not say that it changed the weights: who keeps something made of them would not notice.
        torch.autograd.graph.increment_version(own)
        for parameter in own:
            parameter.grad = None
        for average, decay in averages:
            average.move_rest(decay)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Momenta and step counters as a flat dict of tensors."""
        names = self.held.names
        return {f"{names[k]}/{key}": value for k, entry in self.moments.kept() for key, value in entry.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what :meth:`state` gave; the parameters must be those it was made with."""
        kept: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, what = key.rpartition("/")
            kept.setdefault(name, {})[what] = value
        self.moments.load({k: kept[name] for k, name in enumerate(self.held.names) if name in kept})
