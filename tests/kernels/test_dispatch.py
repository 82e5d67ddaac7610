"""Which form runs, by device, dtype and wish; what is counted; and tangents that have no rule."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from fewstep.errors import UserError
from fewstep.kernels import dispatch


@pytest.fixture(autouse=True)
def _no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


def test_the_closed_form_runs_where_nothing_has_won() -> None:
    assert dispatch.choose("anything", torch.zeros(1)) == "closed"


def test_a_winner_runs_on_its_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "WON", {"one": {"cpu": "reference"}, "other": {"cuda": "triton"}})
    assert [dispatch.choose(name, torch.zeros(1)) for name in ("one", "other")] == ["reference", "closed"]


def test_float64_takes_the_reference_whatever_is_wished() -> None:
    with dispatch.forced("closed"):
        assert dispatch.choose("anything", torch.zeros(1), torch.zeros(1, dtype=torch.float64)) == "reference"


def test_the_environment_asks_for_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "reference, renoise=closed")
    assert dispatch.choose("score_gap", torch.zeros(1)) == "reference"
    assert dispatch.choose("renoise", torch.zeros(1)) == "closed"
    with dispatch.forced({"score_gap": "closed"}):  # whoever asks inside a program is asked first
        assert dispatch.choose("score_gap", torch.zeros(1)) == "closed"


@pytest.mark.parametrize("text", ["fast", "renoise=fast", "renoise="])
def test_an_unknown_form_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, text)
    with pytest.raises(UserError, match="takes reference, closed, triton"):
        dispatch.choose("renoise", torch.zeros(1))


def test_triton_without_a_device_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_runs_on", lambda device: device == "cuda")
    with dispatch.forced("triton"):
        assert dispatch.choose("anything", torch.zeros(1)) == "closed"
    monkeypatch.setattr(dispatch, "triton_runs_on", lambda device: True)
    with dispatch.forced("triton"):
        assert dispatch.choose("anything", torch.zeros(1)) == "triton"
        assert dispatch.choose("anything", torch.zeros(1), triton=False) == "closed"


def test_tensors_without_memory_of_their_own_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_runs_on", lambda device: True)
    with dispatch.forced("triton"), FakeTensorMode():
        assert dispatch.choose("anything", torch.zeros(1)) == "closed"


def test_forms_are_counted_inside_the_context_alone() -> None:
    dispatch.choose("one", torch.zeros(1))
    with dispatch.counted() as outer:
        dispatch.choose("one", torch.zeros(1))
        with dispatch.counted() as inner, dispatch.forced("reference"):
            dispatch.choose("one", torch.zeros(1))
    dispatch.choose("one", torch.zeros(1))
    assert outer == {("one", "closed"): 1, ("one", "reference"): 1}
    assert inner == {("one", "reference"): 1}


def test_tangents_without_a_rule_are_refused() -> None:
    x = torch.ones(2)
    dispatch.refuse_tangents("op", x, None)

    def operation(x: torch.Tensor) -> torch.Tensor:
        dispatch.refuse_tangents("op", x)
        return x

    torch.func.vmap(operation)(x[None])
    with pytest.raises(NotImplementedError, match="op has no forward derivative"):
        torch.func.jvp(operation, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="op has no forward derivative"):
        operation(forward_ad.make_dual(x, x))
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError):
        operation(forward_ad.make_dual(x, x))
