"""Several networks that share the time, seen as one denoiser and played as one role.

Each sample of a batch goes to the expert of its own t. The experts may be networks of a pipeline that splits its loop
by time (Wan 2.2's two), or several adapters of one backbone, one for each phase: what is routed here are denoisers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.diffusion.intervals import TimeIntervals
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.features import FeatureTap
from fewstep.networks.roles import NetworkRole, Role
from fewstep.sending import on_host, sent

#: The number of the expert that each time of (B,) goes to, 0 for the noisiest.
ExpertOf = Callable[[Tensor], list[int]]


class ExpertsDenoiser:
    """Denoisers split by time, itself a :class:`fewstep.diffusion.denoiser.Denoiser`.

    A batch whose times lie in one interval makes one call. Any other is split, and put together again in its order.
    Which sample goes where the host knows of times that it has drawn (:func:`fewstep.sending.on_host`), on a CPU and a
    GPU alike; of others it is read from the device, for which the host waits.

    Args:
        experts: pairs of the lowest t in [0, 1] at which a denoiser is asked and the denoiser, from noise to data; the
            last one's is 0. They have one schedule and one prediction type.
        expert_of: chooses other experts than those of the lowest times.
    """

    def __init__(self, experts: Sequence[tuple[float, NetworkDenoiser]], expert_of: ExpertOf | None = None) -> None:
        self.experts = [denoiser for _, denoiser in experts]
        self.schedule = self.experts[0].schedule
        self.prediction_type = self.experts[0].prediction_type
        intervals = TimeIntervals(self.schedule, tuple(lowest for lowest, _ in experts))
        self.expert_of: ExpertOf = expert_of or (lambda t: intervals.index(_told(t)).tolist())

    def raw(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> Tensor:
        """As :meth:`fewstep.networks.denoiser.NetworkDenoiser.raw`."""
        return self._routed(lambda expert, *inputs: expert.raw(*inputs), x_t, t, conditioning)

    def bare(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> Tensor:
        """As :meth:`fewstep.networks.denoiser.NetworkDenoiser.bare`."""
        return self._routed(lambda expert, *inputs: expert.bare(*inputs), x_t, t, conditioning)

    def settled(self, answer: Tensor, x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> Tensor:
        """As :meth:`fewstep.networks.denoiser.NetworkDenoiser.settled`: one recipe holds for all experts."""
        return self.experts[0].settled(answer, x_t, t, conditioning)

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
        """x0 (B, ...) in the dtype of ``x_t``; ``end`` is ignored."""
        return self._routed(lambda expert, *inputs: expert(*inputs), x_t, t, conditioning)

    def features(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, tap: FeatureTap) -> Tensor:
        """As :meth:`fewstep.networks.denoiser.NetworkDenoiser.features`: every expert is tapped at the same place."""
        return self._routed(lambda expert, *inputs: expert.features(*inputs, tap), x_t, t, conditioning)

    def _routed(self, ask: Callable[..., Tensor], x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> Tensor:
        index = self.expert_of(t)
        called = sorted(set(index))
        if len(called) == 1:
            return ask(self.experts[called[0]], x_t, t, conditioning)
        rows = {k: [row for row, of in enumerate(index) if of == k] for k in called}
        answers = []
        for k, own in rows.items():
            at = sent(own, x_t.device, torch.int64)
            inputs = x_t.index_select(0, at), t.index_select(0, at), conditioning.select(own)
            answers.append(ask(self.experts[k], *inputs))
        order = [row for own in rows.values() for row in own]
        places = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(answers).index_select(0, sent(places, x_t.device, torch.int64))


def _told(t: Tensor) -> Tensor:
    known = on_host(t)
    return t if known is None else known


class ExpertsRole(Role):
    """A role of several experts, each a role of its own: full copies, or adapters on their backbones or on one.

    Args:
        name: of the role.
        experts: key -> (lowest t, the expert's role), from noise to data; the keys name their parts of the state.
        expert_of: as in :class:`ExpertsDenoiser`.
    """

    #: A turn may reach one expert on this process and another one elsewhere.
    gradients_vary = True

    def __init__(
        self, name: str, experts: Mapping[str, tuple[float, NetworkRole]], expert_of: ExpertOf | None = None
    ) -> None:
        roles = {key: role for key, (_, role) in experts.items()}
        denoisers = [(lowest, role.denoiser) for lowest, role in experts.values()]
        super().__init__(name, ExpertsDenoiser(denoisers, expert_of))
        self._experts = roles
        self._weights = nn.ModuleDict({key: role.weights for key, role in roles.items()})
        one = next(iter(roles.values()))
        self.part, self.is_adapter = one.part, one.is_adapter

    @property
    def experts(self) -> Mapping[str, NetworkRole]:
        return self._experts

    @property
    def weights(self) -> nn.Module:
        return self._weights

    def stock_network(self) -> nn.ModuleDict:
        return nn.ModuleDict({key: role.stock_network() for key, role in self.experts.items()})

    def copy_weights(self, other: Role) -> None:
        """Take over the weights of every expert of ``other``; a role without several gives its own to each.

        Raises:
            ValueError: ``other`` has several experts, but not these.
        """
        theirs = other.experts
        if len(theirs) > 1 and theirs.keys() != self.experts.keys():
            raise ValueError(f"{self.name} has the experts {', '.join(self.experts)}, {other.name} {', '.join(theirs)}")
        for key, role in self.experts.items():
            role.copy_weights(theirs[key] if len(theirs) > 1 else other)
