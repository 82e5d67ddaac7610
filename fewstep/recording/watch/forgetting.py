"""What is not kept of a run: what was told and answered by components that are called before the loop alone.

An encoder of texts may answer with the hidden states of all its layers, which are many times what the network is told.
Of such a call its place among the others stays, and whether its answer was finite.
"""

from __future__ import annotations

from typing import Any

from fewstep.recording.watch.finite import is_finite
from fewstep.recording.watch.observation import NetworkCall, Step


def forgotten(call: NetworkCall, output: Any) -> None:
    """Note of a call that it was answered, not with what."""
    call.finite = is_finite(output)
    call.arguments, call.output = {}, None


def forget_encoders(first: Step, second: Step) -> None:
    """Forget the calls of a run's first step by components that its second step does not call.

    The last call of a step is that of a network of the loop; by the second one another may have taken its place.
    """
    if not first.calls:
        return
    loop = {first.calls[-1].component, *(call.component for call in second.calls)}
    for call in first.calls:
        if call.component not in loop:
            forgotten(call, call.output)
