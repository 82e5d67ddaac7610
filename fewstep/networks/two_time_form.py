"""The second time of a network of which diffusers has a class of two times: Wan's, whose students so load stock.

That class, AnyFlowTransformer3DModel, mixes what it makes of the time with what it makes of the step's length, (1 - G)
E1(1000 t) + G E2(1000 (t - r)), G its ``gate_value``. A student here has E1(1000 t) + E(1000 (t - r)), E of E1's own
form: it is the teacher as long as E's last layer is zero, and it is that class with both last layers divided by their
shares. G is no weight of it but a word of its configuration, so a wrong one loads without a complaint.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
from accelerate import init_empty_weights
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from fewstep.errors import UserError

#: Of every student's configuration; the authors' own.
GATE = 0.25
#: The module of Wan's network at which its time enters.
SITE = "condition_embedder.time_embedder"
_DELTA = "condition_embedder.delta_embedder"
#: In units of the scheduler's timesteps, as the class has it.
_SCALE = 1000.0


class DeltaTime(nn.Module):
    """Added to what a network makes of its time: how far the step goes, by a module of the same form.

    Args:
        network: the network's name in its pipeline.
        embedder: that of the time, which it starts as a copy of, but for its last layer, which is zero.
    """

    def __init__(self, network: str, embedder: nn.Module) -> None:
        super().__init__()
        self.network = network
        own: Any = copy.deepcopy(embedder).float()
        self.waves = Timesteps(own.linear_1.in_features, flip_sin_to_cos=True, downscale_freq_shift=0)
        for parameter in own.linear_2.parameters():
            nn.init.zeros_(parameter)
        self.embedder: Any = own

    def forward(self, gap: Tensor) -> Tensor:
        """What is added (B, D) for gaps (B,) in [0, 1]."""
        added: Tensor = self.embedder(self.waves(_SCALE * gap).to(self.embedder.linear_1.weight.dtype))
        return added

    def end(self, _time: Tensor, following: Tensor) -> Tensor:
        """Where a walk's step is said to end: at the next time, as diffusers' pipeline of two times has it."""
        return following

    @contextmanager
    def on(self, network: nn.Module, gap: Callable[[], Tensor]) -> Iterator[None]:
        """Inside, the network is told ``gap()``: (B,) on its device, or (1,) for every sample alike."""

        def tell(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
            return output + self(gap().to(output.device)).to(output.dtype)

        handle = network.get_submodule(SITE).register_forward_hook(tell)
        try:
            yield
        finally:
            handle.remove()


def has_two_time_form(network: nn.Module) -> bool:
    """Whether diffusers' class of two times has room for all of a network."""
    config = getattr(network, "config", {})
    return (
        type(network).__name__ == "WanTransformer3DModel"
        and _stock() is not None
        and config.get("qk_norm") == "rms_norm_across_heads"
        and all(config.get(name) is None for name in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"))
    )


def is_two_time_form(network: nn.Module) -> bool:
    """Whether a network is of that class."""
    return type(network).__name__ == "AnyFlowTransformer3DModel"


def to_two_time_form(network: nn.Module, second_time: DeltaTime) -> nn.Module:
    """The network and its second time as one of diffusers' class, on the same memory but for what is divided."""
    stock = _stock()
    assert stock is not None  # see has_two_time_form
    told: Any = network
    known = {name: value for name, value in told.config.items() if name in _arguments(stock)}
    with init_empty_weights():
        made: nn.Module = stock(**known, gate_value=GATE, deltatime_type="t-r")
    state = {name: value.detach() for name, value in network.state_dict().items()}
    own = second_time.embedder.state_dict().items()
    dtype = state[f"{SITE}.linear_2.weight"].dtype
    state |= {f"{_DELTA}.{name}": value.detach().to(dtype) for name, value in own}
    made.load_state_dict(_divided(state, 1 / (1 - GATE), 1 / GATE), assign=True)
    return made.eval().requires_grad_(False)


def from_two_time_form(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of a one-time network and that of its :class:`DeltaTime`: the inverse of :func:`to_two_time_form`.

    Raises:
        UserError: it is told r itself, not how far the step goes.
    """
    told: Any = network
    if told.config.deltatime_type != "t-r":
        raise UserError(f"this student is told {told.config.deltatime_type!r}, not t-r; it cannot be gone on with")
    gate = float(told.config.gate_value)
    state = _divided(dict(network.state_dict()), 1 - gate, gate)
    delta = {name: value for name, value in state.items() if name.startswith(f"{_DELTA}.")}
    rest = {name: value for name, value in state.items() if name not in delta}
    return rest, {name.replace(_DELTA, "embedder"): value for name, value in delta.items()}


def _divided(state: dict[str, Tensor], of_time: float, of_delta: float) -> dict[str, Tensor]:
    """The state with the last layer of either embedder times a number."""
    factors = {f"{place}.linear_2": by for place, by in ((SITE, of_time), (_DELTA, of_delta))}
    return {
        name: value * factors.get(name.rpartition(".")[0], 1.0) if name.rpartition(".")[0] in factors else value
        for name, value in state.items()
    }


def _stock() -> Any:
    return getattr(diffusers, "AnyFlowTransformer3DModel", None)


@functools.cache
def _arguments(stock: Any) -> frozenset[str]:
    code = stock.__init__
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    return frozenset(code.__code__.co_varnames[: code.__code__.co_argcount])
