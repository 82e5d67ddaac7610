"""A discriminator that trains by itself: heads on the features of a frozen network that another role has."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from fewstep.networks.roles import NetworkRole, Role


class HeadRole(NetworkRole):
    """A role that owns nothing but what is added to it; its features are those of a frozen role's network.

    Args:
        name: of the role.
        of: the frozen role of one network, mostly the teacher.
    """

    def __init__(self, name: str, of: Role) -> None:
        # A denoiser of its own on the same network, so that its passes are told apart.
        super().__init__(name, copy.copy(of.single.denoiser))

    @property
    def experts(self) -> Mapping[str, NetworkRole]:
        return {self.denoiser.recipe.component: self}

    @property
    def weights(self) -> nn.Module:
        return nn.Module()
