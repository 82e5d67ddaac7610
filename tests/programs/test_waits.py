"""In a step that is not logged the host reads nothing from the device, and sends nothing for which it would wait.

Steps are played on fake tensors that say they lie on a GPU, so that none is needed to see what would wait for one.
Networks are stand-ins, and nothing goes backward: what networks do there is their own.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_flow, tiny_stable_diffusion
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from fewstep.programs.methods import method_class, methods
from fewstep.programs.planning.dry_run import DryRun
from fewstep.programs.planning.stand_in import stand_in
from fewstep.programs.planning.weightless import _FakeTensors, fake_world, pretend
from fewstep.recording import Recording, record
from fewstep.sending import sent
from tests.programs.call_cases import SETTINGS, VARIANTS
from tests.programs.test_call_counts import RUN

aten = torch.ops.aten
#: The host needs a number of the device to go on.
READS = (
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
)


class Watched(_FakeTensors):
    """Fake tensors, some on a GPU that is not there, and a list of what the host would wait for."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wait = _wait(function, args, kwargs)
        if wait is not None:
            ours = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            places = [f"{frame.filename}:{frame.lineno}" for frame in ours if frame.filename != __file__]
            self.waits.append(f"{wait} at {' < '.join(places[:-4:-1])}")
            if function is aten._local_scalar_dense.default:
                return 0
        if str(kwargs.get("device", "cpu")).startswith("cuda"):  # also of what is whole numbers alone
            args = tree_map(lambda v: self.from_tensor(v) if type(v) is Tensor else v, args)
            return FakeTensorMode.__torch_dispatch__(self, function, types, args, kwargs)
        return super().__torch_dispatch__(function, types, args, kwargs)


def _wait(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """What the host waits for in an operation, None for nothing."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    if function in READS and any(tensor.device.type == "cuda" for tensor in tensors):
        return f"{function} reads"
    if function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        if any(index is not None and index.dtype == torch.bool for index in args[1]):
            return "an index by a mask"
        return (
            "an index from the host"
            if any(index is not None and index.device != args[0].device for index in args[1])
            else None
        )
    if function is aten._to_copy.default:
        source, target = args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
        ahead = bool(kwargs.get("non_blocking"))
    elif function is aten.copy_.default:
        source, target, ahead = args[1].device.type, args[0].device.type, len(args) > 2 and args[2]
    else:
        return None
    waits = {source, target} == {"cpu", "cuda"} and not (target == "cuda" and ahead)
    return f"a copy from {source} to {target}" if waits else None


class Step:
    """A method on stand-ins on that GPU, played step by step."""

    def __init__(self, method: str, recording: Recording, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.mode = Watched()
        world = partial(fake_world, self.mode)
        recording = stand_in(recording)
        for expert in recording.experts:
            pretend(expert.network, self.mode)
        config = method_class(method).Config(teacher="tiny", out="", **{**RUN, "cpu": False, **settings})
        self.run = DryRun(config, method, recording, "cpu", world)  # what it works out for itself is of the host
        self.run.device = torch.device("cuda")
        with world():
            self.run._conditions = self.run._conditions.to("cuda")
        monkeypatch.setattr(torch.autograd, "grad", _no_gradient)
        with monkeypatch.context() as patch:
            for name in ("zeros", "full"):
                patch.setattr(torch, name, _in_world(getattr(torch, name), world))
            patch.setattr(self.run, "_conditioning", _always_in(self.run._conditioning, world))
            self.method = self.run.prepare()
        with world():
            for role in self.method.roles.values():
                for module in role.added.values():
                    pretend(module, self.mode)
                    module.to("cuda")
                for expert in role.experts.values():
                    expert.denoiser.network.to("cuda")
        self.mode.waits.clear()

    def play(self, steps: Sequence[int]) -> list[str]:
        """What the host would wait for in these steps."""
        with fake_world(self.mode):
            for step in steps:
                for _ in self.method.turns(step, self.run.batch(step)):
                    pass
        return self.mode.waits


def _in_world(function: Callable[..., Any], world: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
        if torch.device(kwargs.get("device") or "cpu").type != "cuda":
            return function(*args, **kwargs)
        with world():
            return function(*args, **kwargs)

    return made


def _always_in(function: Callable[..., Any], world: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    def made(*args: Any) -> Any:
        with world():
            return function(*args)

    return made


def _no_gradient(_outputs: Any, inputs: Any, *_args: Any, **_kwargs: Any) -> tuple[Tensor, ...]:
    """On a GPU that is not there no pass goes backward."""
    return tuple(torch.zeros_like(value) for value in ([inputs] if isinstance(inputs, Tensor) else inputs))


def cases() -> Iterator[Any]:
    for method in methods():
        for variant, settings in {"plain": {}, **VARIANTS.get(method, {})}.items():
            long = () if variant == "plain" else pytest.mark.soak
            yield pytest.param(method, settings, id=f"{method}-{variant}", marks=long)


@pytest.fixture(scope="module")
def recordings() -> dict[str, Recording]:
    return {"flow": record(tiny_flow()), "table": record(tiny_stable_diffusion())}


@pytest.mark.parametrize(("method", "settings"), cases())
def test_no_step_waits_for_the_device(
    method: str, settings: dict[str, Any], recordings: dict[str, Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = recordings["table" if method == "consistency" else "flow"]
    settings = {**SETTINGS.get(method, {}), **settings}
    if settings.get("data"):
        settings["data"] = "images"
        settings.pop("num_pairs", None), settings.pop("pair_steps", None)
    assert Step(method, recording, monkeypatch, **settings).play((0, 1, 2)) == []


def test_what_would_wait_is_seen() -> None:
    mode = Watched()
    with mode:
        x = torch.zeros(3, device="cuda")
        sent([1, 2], "cuda", torch.int64)
        assert mode.waits == []
        for wait in (
            lambda: x.sum().item(),
            lambda: torch.tensor([1, 2], device="cuda"),
            lambda: x[[1, 2]],
            lambda: x.cpu(),
            lambda: torch.equal(x, x.clone()),
        ):
            before = len(mode.waits)
            try:
                wait()
            except RuntimeError as error:  # that fake tensors have no values
                assert "equal" in str(error)
            assert len(mode.waits) == before + 1
    assert isinstance(x, FakeTensor)
