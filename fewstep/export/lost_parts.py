"""Parts of a network that its class does not make again from its configuration, so that no student could hold them.

An IP-Adapter's attention processors and projection, the layers of a loaded LoRA and fused attention weights are put
into a network after it was loaded. ``save_pretrained`` writes them into its file, and ``from_pretrained`` makes the
network of its configuration, which does not know of them, and leaves them out. A LoRA's base model never had them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from fewstep.export.errors import ExportError
from fewstep.recording.watch.quiet import only_errors

if TYPE_CHECKING:
    from fewstep.recording import Recording

_NAMED = 2  # weights that the message names


def refuse_lost_parts(recording: Recording) -> None:
    """Raise :class:`ExportError` for a teacher whose network has weights that a student's folder would lose.

    Args:
        recording: of the teacher.
    """
    for component, network in recording.networks.items():
        if lost := lost_weights(network):
            rest = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
            raise ExportError(
                f"the {component} of {type(recording.pipeline).__name__} has weights that its class does not load "
                f"again ({', '.join(lost[:_NAMED])}{rest}), so its student would be without them: call "
                "unload_ip_adapter() (an IP-Adapter can be loaded into the student afterwards), "
                "unfuse_qkv_projections() or unload_lora_weights() (a LoRA goes by teacher_lora), whichever put them "
                "there, and distil that"
            )


def lost_weights(network: nn.Module) -> list[str]:
    """The names of a network's parameters that its class, made of its configuration, does not have.

    That one is made without memory. A network that is not of diffusers' kind has none: how such is loaded is not known.
    """
    if not isinstance(network, ModelMixin):
        return []
    kind: Any = type(network)
    with only_errors(), no_init_weights(), init_empty_weights():
        made = kind.from_config(network.config)
    known = {name for name, _ in made.named_parameters()}
    return [name for name, _ in network.named_parameters() if name not in known]
