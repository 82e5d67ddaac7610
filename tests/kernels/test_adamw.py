"""The update of a role in its three forms: torch's AdamW, and bit for bit what was three steps one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import torch
from forms import assert_near
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.kernels import adamw, dispatch
from fewstep.kernels.updates import Follower, Moments, Rule

#: Shapes of parameters: a convolution, a bias, a scalar, none at all, more than one program of the kernel.
SHAPES = ((8, 3, 3, 3), (8,), (), (0, 4), (70, 71))
RULE = Rule(lr=1e-2, betas=(0.8, 0.99), weight_decay=0.1)
#: In these of the four steps of :class:`History` nothing is updated, and parameter 1 has no gradient.
SKIPPED, ABSENT = (2,), (0, 1)


def tensors(seed: int, dtype: torch.dtype, device: str, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


class History:
    """Four updates of a few parameters with two averages, one of which leaves out the first parameter."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.parameters, self.device = tensors(0, dtype, device), device
        self.averages = [tensors(1, dtype, device), [None, *tensors(2, dtype, device)[1:]]]

    def gradients(self, step: int) -> list[Tensor | None]:
        found = tensors(10 + step, self.parameters[0].dtype, self.device)
        return [None if k == 1 and step in ABSENT else g for k, g in enumerate(found)]

    def at(self, step: int) -> tuple[Tensor, Tensor, list[float]]:
        """Clip factor, skip, and the weights of the averages."""
        skip = float(step in SKIPPED)
        scale = torch.full((), float("nan") if skip else 0.3 + 0.2 * step, device=self.device)
        return scale, torch.full((), skip, device=self.device), [0.1, 0.6 - 0.1 * step]

    def ours(self) -> list[Tensor]:
        moments = Moments(self.parameters)
        for step in range(4):
            scale, skip, weights = self.at(step)
            followers = [Follower(*pair) for pair in zip(self.averages, weights)]
            adamw.adamw(moments, self.gradients(step), RULE, scale=scale, skip=skip, followers=followers)
        kept = [value for _, entry in moments.kept() for value in entry.values()]
        return [*self.parameters, *(a for average in self.averages for a in average if a is not None), *kept]

    def of_torch(self, **options: bool) -> list[Tensor]:
        """Clip, torch.optim.AdamW and foreach averages one after the other."""
        optimizer = torch.optim.AdamW(self.parameters, RULE.lr, RULE.betas, RULE.eps, RULE.weight_decay, **options)
        for step in range(4):
            scale, skip, weights = self.at(step)
            for parameter, gradient in zip(self.parameters, self.gradients(step)):
                parameter.grad = gradient if gradient is None else gradient.mul_(scale)
            if not skip:
                optimizer.step()
            for average, weight in zip(self.averages, weights):
                pairs = [(a, p) for a, p in zip(average, self.parameters) if a is not None]
                torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], weight)
        kept = [optimizer.state[p][key] for p in self.parameters for key in ("step", "exp_avg", "exp_avg_sq")]
        return [*self.parameters, *(a for average in self.averages for a in average if a is not None), *kept]


def test_the_reference_is_torchs_adamw_in_float64(device: str) -> None:
    with dispatch.counted() as counted:
        ours = History(torch.float64, device).ours()
    assert counted == {("adamw", "reference"): 4}
    for one, other in zip(ours, History(torch.float64, device).of_torch(foreach=False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("block", [adamw.BLOCK, 64])
def test_the_closed_form_is_the_three_steps_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, block: int, dtype: torch.dtype, device: str
) -> None:
    monkeypatch.setattr(adamw, "BLOCK", block)
    for one, other in zip(History(dtype, device).ours(), History(dtype, device).of_torch(fused=True), strict=True):
        assert torch.equal(one, other)


def test_forms_in_float32(form: str, device: str) -> None:
    with dispatch.forced(form), dispatch.counted() as counted:
        ours = History(torch.float32, device).ours()
    assert counted == {("adamw", form): 4}
    for one, other in zip(ours, History(torch.float64, device).of_torch(foreach=False), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=2e-5, atol=1e-6)


def test_forms_in_bfloat16(form: str, device: str) -> None:
    """One update from the same numbers: what is written differs by one rounding of bfloat16."""
    found = {}
    for wide in (False, True):
        inputs = adamw.example((3, 5, 7), torch.bfloat16, device)
        change: Callable[[Tensor], Tensor] = Tensor.double if wide else Tensor.clone
        inputs["moments"] = moments = Moments([change(p) for p in inputs["moments"].parameters])
        inputs["gradients"] = [change(g) for g in inputs["gradients"]]
        averages = [change(a) for a in inputs["followers"][0].tensors]
        with dispatch.forced(form):
            adamw.adamw(**inputs | {"followers": [Follower(averages, 0.5)]})
        momenta = [entry[key] for _, entry in moments.kept() for key in ("exp_avg", "exp_avg_sq")]
        found[wide] = [*moments.parameters, *momenta]
        found[wide] += averages if wide else []
        if not wide:  # averages follow what was written
            before = adamw.example((3, 5, 7), torch.bfloat16, device)["followers"][0].tensors
            found["averages"] = list(zip(averages, before, moments.parameters))
    for one, other in zip(found[False], found[True]):
        assert_near(one, other)
    for average, before, parameter in found["averages"]:
        assert_near(average, (before.double() + parameter.double()) / 2)


def test_where_nothing_is_to_be_updated_averages_alone_move(form: str, device: str) -> None:
    inputs = adamw.example((3, 4, 5), torch.float32, device)
    moments, averages = inputs["moments"], inputs["followers"][0].tensors
    with dispatch.forced(form):
        adamw.adamw(**inputs)
        before = [p.clone() for p in (*moments.parameters, *(v for _, e in moments.kept() for v in e.values()))]
        inputs["gradients"] = [torch.full_like(p, float("nan")) for p in moments.parameters]
        expected = [a + 0.01 * (p - a) for a, p in zip(averages, moments.parameters)]
        nan = torch.full((), float("nan"), device=device)
        adamw.adamw(**inputs | {"skip": torch.ones((), device=device), "scale": nan})
    after = [*moments.parameters, *(v for _, e in moments.kept() for v in e.values())]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    for average, other in zip(averages, expected):
        torch.testing.assert_close(average, other)


def test_other_layouts(form: str, device: str) -> None:
    def last(tensor: Tensor) -> Tensor:
        return tensor.to(memory_format=torch.channels_last)

    results = []
    for change in (Tensor.clone, last):
        inputs = adamw.example((2, 4, 3, 3, 3), torch.float32, device)
        inputs["moments"] = moments = Moments([change(p) for p in inputs["moments"].parameters])
        inputs["gradients"] = [change(g) for g in inputs["gradients"]]
        averages = [change(a) for a in inputs["followers"][0].tensors]
        with dispatch.forced(form), dispatch.counted() as counted:
            adamw.adamw(**inputs | {"followers": [Follower(averages, 0.01)]})
        assert counted == {("adamw", form): 1}
        results.append([*moments.parameters, *averages])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_kernel_takes_no_tensors_that_lie_differently(device: str) -> None:
    inputs = adamw.example((2, 4, 5), torch.float32, device)
    mixed = inputs | {"followers": [Follower([torch.zeros(5, 4, device=device).T] * 2, 0.5)]}
    three = inputs | {"followers": inputs["followers"] * 3}
    for unfit in (mixed, three):
        with dispatch.forced("triton"), dispatch.counted() as counted:
            adamw.adamw(**unfit)
        assert counted == {("adamw", "closed"): 1}


def test_what_is_kept_is_loaded_and_forgotten(device: str) -> None:
    inputs = adamw.example((3, 4, 5), torch.float32, device)
    moments = inputs["moments"]
    inputs["gradients"][1] = None
    adamw.adamw(**inputs)
    kept = {place: {key: value.clone() for key, value in entry.items()} for place, entry in moments.kept()}
    assert kept.keys() == {0, 2} and all(entry["step"] == 1 for entry in kept.values())
    other = Moments(moments.parameters)
    other.load(kept)
    for (_, one), (_, two) in zip(moments.kept(), other.kept(), strict=True):
        assert all(torch.equal(one[key], two[key]) and one[key] is not two[key] for key in one)
    other.load({})
    assert not list(other.kept())
    adamw.adamw(**inputs | {"moments": other, "gradients": [torch.ones_like(p) for p in moments.parameters]})
    assert {float(entry["step"]) for _, entry in other.kept()} == {1.0}


class Reads(TorchDispatchMode):
    """Counts what makes the host wait: numbers that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.count += function in (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)
        return function(*args, **(kwargs or {}))


def test_the_host_reads_nothing(form: str, device: str) -> None:
    inputs = adamw.example((3, 4, 5), torch.float32, device)
    with dispatch.forced(form):
        adamw.adamw(**inputs)
        inputs["gradients"] = [*adamw.example((2, 4, 5), torch.float32, device)["gradients"], None]
        with Reads() as reads:
            adamw.adamw(**inputs)
            assert reads.count == 0
            assert bool(inputs["skip"] == 0) and reads.count == 1


def test_twice_as_fast_as_tensor_by_tensor() -> None:
    """Finite test, clip, AdamW and EMA of 26 M parameters in 1,200 tensors, on one core.

    Measured 2.9 to 3.6 times on a shared machine: what is asked here is below all that its other programs make of it.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(1200, generator=generator) ** 6
    sizes = [max(1, int(size)) for size in weights / weights.sum() * 26e6]
    parameters = [torch.zeros(size) for size in sizes]
    gradients, averages = ([torch.full((size,), 1e-3) for size in sizes] for _ in range(2))
    optimizer, moments = torch.optim.AdamW(parameters, foreach=False), Moments(parameters)

    def one_by_one() -> None:
        for parameter, gradient in zip(parameters, gradients):
            assert torch.isfinite(gradient).all()
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        optimizer.step()
        for average, parameter in zip(averages, parameters):
            average.mul_(0.99).add_(parameter, alpha=0.01)

    def together() -> None:
        norm = torch.nn.utils.get_total_norm(gradients)
        scale = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        skip = (~torch.isfinite(norm)).float()
        adamw.adamw(moments, gradients, Rule(1e-3), scale=scale, skip=skip, followers=[Follower(averages, 0.01)])

    took: dict[Callable[[], None], list[float]] = {one_by_one: [], together: []}
    for function in (one_by_one, together) * 4:
        began = time.perf_counter()
        function()
        took[function].append(time.perf_counter() - began)
    assert min(took[one_by_one][1:]) > 2 * min(took[together][1:])
