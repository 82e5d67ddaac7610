"""Which form of an operation runs, and how often each ran.

An operation has up to three forms, which compute the same:

- ``reference``: eager torch in the words of the paper. It is the definition, and runs in float64 too.
- ``closed``: the same rearranged for few passes over memory, in float32, on any device.
- ``triton``: one or two kernels, on a GPU or in Triton's interpreter.

A form that has not won on a device in ``fewstep bench --part kernels`` is not what runs there: :data:`WON` has the
winners, elsewhere it is the closed form. float64 always takes the reference. ``FEWSTEP_KERNELS=triton`` asks for a form
by name, ``FEWSTEP_KERNELS=score_gap=triton,renoise=reference`` for some operations only, :func:`forced` does so inside
a program.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fewstep.errors import UserError

logger = logging.getLogger("fewstep")

FORMS = ("reference", "closed", "triton")
VARIABLE = "FEWSTEP_KERNELS"
#: operation -> device type -> the form that won there; the closed form is not listed.
WON: Mapping[str, Mapping[str, str]] = {}
#: Applies to every operation that is not named.
_ALL = "*"

#: What is asked for by name; None: what the environment says.
_forced: ContextVar[Mapping[str, str] | None] = ContextVar("forced", default=None)
_counters: list[Counter[tuple[str, str]]] = []
_said: set[str] = set()


def choose(operation: str, *tensors: Tensor, triton: bool = True) -> str:
    """The form of an operation to run on these tensors; it is counted as run.

    Args:
        operation: its name.
        tensors: what it computes with.
        triton: whether the Triton form can take them (shapes, layout); dtype and device are looked at here.

    Raises:
        UserError: the environment asks for a form that does not exist.
    """
    if torch.compiler.is_compiling():
        # Dynamo forgets an autograd.Function's own jvp, and fuses plain operations by itself.
        return "closed"
    form = _form(operation, tensors, triton)
    count(operation, form)
    return form


def count(operation: str, form: str) -> None:
    """Note that a form of an operation runs; only one that is not chosen here has to say so."""
    for counter in _counters:
        counter[operation, form] += 1


def _form(operation: str, tensors: tuple[Tensor, ...], triton: bool) -> str:
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "reference"
    device = tensors[0].device.type
    wishes = _forced.get()
    if wishes is None:
        wishes = wishes_in(os.environ.get(VARIABLE, ""))
    wish = wishes.get(operation, wishes.get(_ALL))
    form = wish or WON.get(operation, {}).get(device, "closed")
    # Of a subclass's memory (fake tensors of a dry run, shards) a kernel knows nothing.
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
    if form == "triton" and not (triton and plain and triton_runs_on(device)):
        if wish:
            _say(f"{operation}: no Triton on {device} for these tensors; the closed form runs")
        return "closed"
    return form


@cache
def wishes_in(text: str) -> Mapping[str, str]:
    """operation -> form of what the environment's variable holds; ``*`` stands for all others.

    Raises:
        UserError: it names no form.
    """
    wishes: dict[str, str] = {}
    for word in filter(None, text.split(",")):
        operation, equals, form = word.strip().rpartition("=")
        if form not in FORMS:
            raise UserError(f"{VARIABLE} takes {', '.join(FORMS)}, or OPERATION=FORM,...; not {word.strip()!r}")
        wishes[operation if equals else _ALL] = form
    return wishes


@contextmanager
def forced(form: str | Mapping[str, str]) -> Iterator[None]:
    """Inside, operations run in the form that is named, all of them or each in its own (``{operation: form}``)."""
    wishes = {_ALL: form} if isinstance(form, str) else dict(form)
    assert set(wishes.values()) <= set(FORMS)
    token = _forced.set(wishes)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def counted() -> Iterator[Counter[tuple[str, str]]]:
    """Inside, how often each form of each operation ran, by (operation, form); compiled code is not counted."""
    counter: Counter[tuple[str, str]] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters[:] = [other for other in _counters if other is not counter]


@cache
def triton_runs_on(device: str) -> bool:
    """Whether Triton kernels run on a type of device: a GPU, or anywhere in its interpreter."""
    if find_spec("triton") is None:
        return False
    return device in ("cuda", "xpu") or interpreted()


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for, which runs kernels on CPU tensors and is for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether any of the tensors is differentiated forward here (``torch.func.jvp``, ``forward_ad.dual_level``)."""
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def refuse_tangents(operation: str, *tensors: Tensor | None) -> None:
    """Raise where an operation without a rule for tangents meets one: a zero would be a wrong derivative.

    Raises:
        NotImplementedError: a tensor is differentiated forward.
    """
    if has_tangent(*tensors):
        raise NotImplementedError(f"{operation} has no forward derivative; FEWSTEP_KERNELS=reference computes one")


def _say(line: str) -> None:
    if line not in _said:
        _said.add(line)
        logger.info("%s", line)
