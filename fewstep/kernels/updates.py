"""What an update of parameters goes by, and what the forms of :mod:`fewstep.kernels.adamw` are handed of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """What an update goes by: the learning rate of now, (b1, b2), the weight decay wd, and eps."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8


@dataclass(frozen=True)
class Follower:
    """An average: for each parameter a tensor like it, or None, and the weight w in [0, 1] by which it moves there."""

    tensors: Sequence[Tensor | None]
    weight: float


@dataclass
class Row:
    """One parameter in one update: without a gradient it stays; m and v it has from its first gradient on.

    ``count`` is k, () float32, after this update.
    """

    parameter: Tensor
    count: Tensor
    gradient: Tensor | None
    momenta: tuple[Tensor, Tensor] | None
    averages: tuple[Tensor | None, ...]

    def tensors(self) -> list[Tensor]:
        """All that are of the parameter's shape."""
        found = [self.parameter, self.gradient, *(self.momenta or ()), *self.averages]
        return [tensor for tensor in found if tensor is not None]

    def moved(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
        """p, g, m, v and k of a parameter that has a gradient, else None."""
        if self.gradient is None or self.momenta is None:
            return None
        return self.parameter, self.gradient, *self.momenta, self.count


@dataclass(frozen=True)
class Common:
    """What all rows share: k of each (n,), c and skip () float32 on their device, and the averages' weights."""

    rule: Rule
    counts: Tensor
    scale: Tensor | None
    skip: Tensor
    weights: tuple[float, ...]


class Moments:
    """Parameters, and what AdamW keeps of them.

    Args:
        parameters: in a fixed order, of any devices and dtypes.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        kinds = [(parameter.device, parameter.dtype) for parameter in self.parameters]
        #: The places of the parameters of one device and dtype, and their update counts (n,): one addition counts all.
        self._parts = [
            ([place for place, own in enumerate(kinds) if own == kind], torch.zeros(kinds.count(kind), device=kind[0]))
            for kind in dict.fromkeys(kinds)
        ]
        counts = {k: count for places, n in self._parts for k, count in zip(places, n.unbind(), strict=True)}
        self._counts = [counts[place] for place in range(len(kinds))]
        self._momenta: dict[int, tuple[Tensor, Tensor]] = {}

    def kept(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Place of a parameter, and its ``step`` (), ``exp_avg`` and ``exp_avg_sq``, where it ever had a gradient."""
        for place, (first, second) in sorted(self._momenta.items()):
            yield place, {"step": self._counts[place].clone(), "exp_avg": first, "exp_avg_sq": second}

    def load(self, kept: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Take over what :meth:`kept` gave; a parameter of which there is nothing begins anew."""
        self._momenta = {}
        for place, (parameter, count) in enumerate(zip(self.parameters, self._counts, strict=True)):
            entry = kept.get(place)
            if entry is None:
                count.zero_()
                continue
            count.copy_(entry["step"])
            self._momenta[place] = _like(parameter, entry["exp_avg"]), _like(parameter, entry["exp_avg_sq"])

    def rows(
        self, gradients: Sequence[Tensor | None], followers: Sequence[Follower]
    ) -> Iterator[tuple[list[Row], Tensor]]:
        """The rows of one update, apart for each device and dtype, with all their counts (n,), still before it."""
        for places, counts in self._parts:
            yield [self._row(place, gradients[place], followers) for place in places], counts

    def _row(self, place: int, gradient: Tensor | None, followers: Sequence[Follower]) -> Row:
        parameter = self.parameters[place]
        if gradient is not None and place not in self._momenta:
            self._momenta[place] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        averages = tuple(follower.tensors[place] for follower in followers)
        return Row(parameter, self._counts[place], gradient, self._momenta.get(place), averages)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(parameter, requires_grad=False).copy_(value)
