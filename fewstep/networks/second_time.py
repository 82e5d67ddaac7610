"""Giving roles a second time: a module of their own that tells their network where its step ends."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.errors import UserError
from fewstep.networks.adapters import AdapterRole
from fewstep.networks.derivative import refuse_underivable
from fewstep.networks.flow_map import SECOND_TIME, FlowMapDenoiser
from fewstep.networks.recompute import checkpointed
from fewstep.networks.roles import FOLLOWERS, NetworkRole, Role, allow_checkpointing
from fewstep.networks.time_embedders import find_time_embedders
from fewstep.networks.two_time_form import SITE, DeltaTime

# Relative; another kernel for another dtype of the time, where the network runs in half precision.
_EQUAL = {torch.float64: 1e-6, torch.float32: 1e-4}


@torch.no_grad()
def add_second_time(
    roles: dict[str, Role],
    component: str,
    x: Tensor,
    conditioning: AnyConditioning,
    differentiated: bool,
    gradient_checkpointing: bool,
    seed: int,
    stock: bool = False,
    told: str = "next",
) -> None:
    """Give the student and what follows it a second time, and prove that it changes nothing yet.

    Args:
        roles: of a run, on one network each.
        component: its name in the pipeline.
        x: a sample (2, ...).
        conditioning: of two samples.
        differentiated: whether the student's derivative by its time is wanted.
        gradient_checkpointing: whether blocks of the student run again in the backward pass.
        seed: of the second time's first weights, the same on every process.
        stock: whether it is one that diffusers' network of two times has room for.
        told: where a walk says that its steps end, see :mod:`fewstep.pipelines.flow_map`.

    Raises:
        UserError: the network has no place for it, or takes no times between those of its table, or has no derivative.
    """
    teacher, schedule = roles["teacher"].single.denoiser, roles["teacher"].denoiser.schedule
    t = schedule.snap(torch.full((2,), 0.5, dtype=torch.float64, device=x.device))
    sites = find_time_embedders(teacher.network, partial(teacher.raw, conditioning=conditioning), x, t)
    for name, role in roles.items():
        if name in ("student", *FOLLOWERS):
            checkpointing = gradient_checkpointing and name == "student"
            attach_second_time(role.single, component, sites, checkpointing, seed, stock, told)
    student = roles["student"].denoiser
    assert isinstance(student, FlowMapDenoiser)  # from here on
    theirs, ours = teacher.raw(x, t, conditioning), student.raw(x, t, conditioning, end=0.3 * t)
    kind = type(teacher.network).__name__
    if not float((ours - theirs).abs().max()) <= _EQUAL.get(theirs.dtype, 3e-2) * float(theirs.abs().max()):
        raise UserError(f"{kind} answers otherwise when its time is no integer; a mean flow needs all times")
    if differentiated:
        refuse_underivable(lambda t: student.raw(x, t, conditioning, end=0.3 * t.detach()), t, student.network)


def attach_second_time(
    role: NetworkRole,
    component: str,
    sites: dict[str, int],
    checkpointing: bool,
    seed: int,
    stock: bool = False,
    told: str = "next",
) -> None:
    """Let a role be told a second time: it owns a new module, which changes nothing yet.

    Args:
        role: its denoiser becomes a :class:`FlowMapDenoiser`.
        component: the network's name in its pipeline.
        sites: from :func:`fewstep.networks.time_embedders.find_time_embedders`.
        checkpointing: whether blocks of the network run again in the backward pass.
        seed: of the module's first weights, the same on every process.
        stock: whether it is :class:`fewstep.networks.two_time_form.DeltaTime`, at its own site.
        told: where a walk says that its steps end, see :mod:`fewstep.pipelines.flow_map`; a stock one is told the next.
    """
    module: nn.Module
    if stock:
        module = DeltaTime(component, role.denoiser.network.get_submodule(SITE))
    else:
        own = importlib.import_module("fewstep.pipelines.flow_map").SecondTime
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = own(component, sites, told=told)
    parameter = next(role.denoiser.network.parameters())
    trained = any(p.requires_grad for p in role.weights.parameters())
    module = module.to(parameter.device).eval().requires_grad_(trained)
    role.add(SECOND_TIME, module)
    role.denoiser = denoiser = FlowMapDenoiser(role.denoiser, module)
    if not checkpointing:
        return
    if isinstance(role, AdapterRole):
        role.backbone.reenter[role.name] = denoiser.reenter
        return

    def again(block: Callable[..., Any], *args: Any) -> Any:
        return checkpointed(block, args, denoiser.reenter())

    allow_checkpointing(denoiser.network, again)
