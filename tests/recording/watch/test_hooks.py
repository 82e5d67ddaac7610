"""Hooks for the length of a context, and the one call of a network under which they see its inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from synthetic import synthetic
from torch import nn

from fewstep.errors import first_line, one_line
from fewstep.recording import record
from fewstep.recording.watch.hooks import hooked
from tests.recording.synthetic_parts import Traits


def test_hooks_see_and_change_a_call_and_are_gone_afterwards() -> None:
    layer, seen = nn.Identity(), []

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append((name, module is layer, args, kwargs))
        return (args[0] + 1,), {}

    with hooked({"a": layer}, before=before, after=lambda _name, _module, _args, _kwargs, output: 10 * output):
        assert layer(torch.tensor(1)) == 20
    assert seen == [("a", True, (1,), {})] and layer(torch.tensor(1)) == 1


def test_hooks_are_gone_after_an_error() -> None:
    layer = nn.Identity()

    def fail(*_: Any) -> None:
        raise KeyError

    with pytest.raises(KeyError), hooked({"": layer}, before=fail, after=fail):
        layer(1)
    assert not layer._forward_pre_hooks and not layer._forward_hooks


def test_the_probe_calls_the_network_once_in_eval_mode() -> None:
    recording = record(synthetic(Traits()), prompt="a cat")
    recording.network.train()
    modes: list[bool] = []
    with hooked({"": recording.network}, before=lambda _name, module, _args, _kwargs: modes.append(module.training)):
        answer = recording.probe()
    assert modes == [False] and recording.network.training
    assert answer.shape == (1, *recording.sample_shape) and not answer.requires_grad


@pytest.mark.parametrize(
    ("error", "first", "one"),
    [
        (ValueError("\n no file\n at all "), "no file", "no file at all"),
        (ValueError(), "ValueError", "ValueError"),
        (ValueError("\n"), "ValueError", "ValueError"),
        (ValueError("of\u2028one\x85line\r\nsecond"), "of\u2028one\x85line", "of one line second"),
    ],
)
def test_the_words_of_an_exception(error: Exception, first: str, one: str) -> None:
    assert first_line(error) == first and one_line(error) == one
