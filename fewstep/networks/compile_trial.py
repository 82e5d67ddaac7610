"""Networks of roles are compiled before training, and compared with themselves uncompiled, forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.networks.attention_trial import apart, is_half
from fewstep.networks.compiled import CompiledForms, reason
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.head_role import HeadRole
from fewstep.networks.roles import Role

#: How far a compiled network's answer and gradients may be from its own, relative: in float32, and in half precision,
#: where a graph rounds less often.
CLOSE = {False: 1e-3, True: 5e-2}


def compile_roles(
    roles: Mapping[str, Role],
    x: Tensor,
    t: Tensor,
    conditioning: AnyConditioning,
    say: Callable[[str], None],
    backend: str | Callable[..., Any] = "inductor",
) -> str:
    """Let the networks of all roles but ``ema`` and heads alone run compiled, or none where one cannot.

    Args:
        roles: of a run, before its training.
        x: samples (B, ...) of a training batch's size.
        t: times (B,).
        conditioning: of B samples.
        say: told in one line what happens later: a shape that cannot be compiled.
        backend: of ``torch.compile``.

    Returns:
        What is compiled, in one line, or why nothing is.
    """
    began = time.monotonic()
    compiled: dict[str, NetworkDenoiser] = {}
    before = {}
    left: dict[str, str] = {}
    far = 0.0
    for name, role in roles.items():
        if name == "ema" or isinstance(role, HeadRole):  # samples alone, in batches of their own; features alone
            continue
        for component, expert in role.experts.items():
            key = name if len(role.experts) == 1 else f"{name}_{component}"
            denoiser = expert.denoiser
            if type(denoiser) is not NetworkDenoiser:  # by hooks, anew in every call
                left[key] = "a second time" if role.has_second_time else "a second prompt"
                continue
            compiled[key], before[key] = denoiser, denoiser.form
            trained = [p for p in expert.weights.parameters() if p.requires_grad]
            try:
                far = max(far, _tried(denoiser, key, trained, x, t, conditioning, say, backend))
            except Exception as error:  # a compiler raises whatever it does
                for one, plain in before.items():
                    compiled[one].form = plain
                return f"--compile: nothing is compiled: {reason(error)}"
    kinds = ", ".join(dict.fromkeys(type(one.network).__name__ for one in compiled.values()))
    why = f"is told {' and '.join(dict.fromkeys(left.values()))}"
    if not compiled:
        return f"--compile: nothing is compiled: {', '.join(left)} {why}"
    also = f"; not {', '.join(left)}, which {why}" if left else ""
    took = f"{time.monotonic() - began:.0f} s, answers and gradients as without to {far:.0e}"
    return f"compiled: {', '.join(compiled)} ({kinds}) in {took}{also}"


def _tried(
    denoiser: NetworkDenoiser,
    name: str,
    trained: Sequence[Tensor],
    x: Tensor,
    t: Tensor,
    conditioning: AnyConditioning,
    say: Callable[[str], None],
    backend: str | Callable[..., Any],
) -> float:
    """How far the compiled network is from the plain one; afterwards it is the compiled one that is called."""
    trouble: list[str] = []
    form = CompiledForms(name, backend, trouble.append)
    before = _pass(denoiser, trained, x, t, conditioning)
    denoiser.form = form
    after = _pass(denoiser, trained, x, t, conditioning)
    if trouble:
        raise RuntimeError(trouble[0].rpartition("stays uncompiled: ")[2])
    far, most = max(apart(*both) for both in zip(before, after, strict=True)), CLOSE[is_half(denoiser)]
    if not far <= most:
        raise RuntimeError(f"the compiled {name} is {far:.0e} from the plain one, and {most:.0e} is allowed")
    form.say = say
    return far


def _pass(
    denoiser: NetworkDenoiser, trained: Sequence[Tensor], x: Tensor, t: Tensor, conditioning: AnyConditioning
) -> tuple[list[Tensor], list[Tensor]]:
    """A network's answer, and the gradients of what is trained; a frozen one is asked as teachers are."""
    with torch.set_grad_enabled(bool(trained)):
        answer = denoiser.raw(x, t, conditioning)
        loss = answer.float().square().mean()
        gradients = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True) if trained else ()
    return [answer.detach()], list(gradients)
