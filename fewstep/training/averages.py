"""An average of a role: what of it moves in the pass that updates the role, and what moves after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from fewstep.kernels.updates import Follower
from fewstep.networks.roles import FOLLOWERS, Role, move_averages, tensors_followed
from fewstep.training.held import Held


class Average:
    """average <- decay * average + (1 - decay) * role, over all that both own, as far as it lies on this process.

    Args:
        average: that moves.
        role: that it follows.
        held: the parameters of ``role`` that are updated.
        here: of a tensor of either, what lies on this process.
    """

    def __init__(self, average: Role, role: Role, held: Held, here: Callable[[Tensor], Tensor]) -> None:
        pairs = tensors_followed(average, role)
        self._beside = [here(pairs.pop(name)[0]) if name in pairs else None for name in held.names]
        #: Buffers, and parameters that are not trained.
        self._rest = [(here(ours), here(theirs)) for ours, theirs in pairs.values()]

    def follower(self, decay: float) -> Follower:
        """What moves in the pass that updates the role's parameters."""
        return Follower(self._beside, 1 - decay)

    def move_rest(self, decay: float) -> None:
        """Move what else there is."""
        move_averages(self._rest, decay)


def averages_of(roles: Mapping[str, Role], held: Held, here: Callable[[Tensor], Tensor]) -> dict[str, Average]:
    """What follows the student among the roles of a run; ``held`` and ``here`` as in :class:`Average`."""
    return {name: Average(roles[name], roles["student"], held, here) for name in FOLLOWERS if name in roles}
