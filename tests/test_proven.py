"""The suite's own saving: which teacher is taken for one that was recorded or proven before, and what is not kept."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from proven import proven_once
from tiny_pipelines import TINY, tiny_ddim

from fewstep.conditioning.tree import leaves
from fewstep.recording import Recording, RecordingError, record
from fewstep.recording.rules.fit import differs
from tests.recording.synthetic import synthetic
from tests.recording.synthetic_parts import Traits


def other_weight(pipeline: Any) -> None:
    with torch.no_grad():
        pipeline.unet.conv_in.bias[0] += 1e-3


def other_schedule(pipeline: Any) -> None:
    pipeline.scheduler = DDIMScheduler(beta_end=0.019)


def other_length(pipeline: Any) -> None:
    pipeline.tokenizer.model_max_length -= 1


def own_method(pipeline: Any) -> None:
    pipeline.encode_prompt = pipeline.encode_prompt


def mute() -> Any:
    """A teacher whose answer is zero, of which its proof warns."""
    pipeline = tiny_ddim()
    torch.nn.init.zeros_(pipeline.unet.conv_out.weight)
    return pipeline


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """The recordings that are really proven, from none on."""
    found, prove = [], Recording.prove

    def noted(self: Recording, seed: int = 0) -> Any:
        found.append(self)
        return prove(self, seed)

    monkeypatch.setattr(Recording, "prove", noted)
    monkeypatch.setattr("proven._PROOFS", {})
    return found


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pipelines that are really recorded, from none on."""
    found = []

    def noted(pipeline: Any, items: Any = None, **call: Any) -> Recording:
        found.append(pipeline)
        return record(pipeline, items=items, **call)

    monkeypatch.setattr("proven.record", noted)
    monkeypatch.setattr("proven._RECORDINGS", {})
    return found


@pytest.mark.parametrize("change", [None, other_weight, other_schedule, other_length, own_method])
def test_an_equal_teacher_alone_is_taken_for_recorded(change: Any, recorded: list[Any]) -> None:
    make, call = TINY["stable_diffusion"]
    first, second = make(), make()
    if change is not None:
        change(second)
    one, two = (proven_once(pipeline, **call) for pipeline in (first, second))
    assert recorded == ([first] if change is None else [first, second])
    assert two.pipeline is second
    assert two.networks == {"unet": second.unet}
    assert one.pipeline is first


def test_a_recording_that_is_taken_up_is_that_of_its_own_pipeline(recorded: list[Any]) -> None:
    make, call = TINY["stable_diffusion"]
    proven_once(make(), **call)
    taken, fresh = proven_once(second := make(), **call), record(second, **call)
    assert len(recorded) == 1
    assert taken.summary() == fresh.summary()
    prompts = [taken.condition(prompts=["a dog"]), fresh.condition(prompts=["a dog"])]
    assert not differs(*(dict(leaves(told.tree))["encoder_hidden_states"].value for told in prompts))
    assert taken.prove(seed=1).checks == fresh.prove(seed=1).checks


def test_another_call_is_recorded_anew(recorded: list[Any]) -> None:
    make, call = TINY["stable_diffusion"]
    for height in (8, 16):
        proven_once(make(), **{**call, "height": height, "width": 16})
    assert len(recorded) == 2


@pytest.mark.filterwarnings("ignore:the answer of")
@pytest.mark.parametrize(("change", "expected"), [(None, 1), (other_weight, 2), (other_schedule, 2)])
def test_an_equal_teacher_alone_is_taken_for_proven(change: Any, expected: int, proofs: list[Recording]) -> None:
    first, second = tiny_ddim(), tiny_ddim()
    if change is not None:
        change(second)
    told = [proven_once(pipeline).prove() for pipeline in (first, second)]
    assert len(proofs) == expected
    assert (told[0] is told[1]) == (expected == 1)


@pytest.mark.parametrize(("make", "call"), [TINY[name] for name in ("ddim", "stable_diffusion")])
def test_where_a_teacher_comes_from_makes_no_difference(
    make: Callable[[], Any], call: dict[str, Any], proofs: list[Recording], tmp_path: Path
) -> None:
    made = make()
    made.save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    loaded = [type(made).from_pretrained(tmp_path / name) for name in ("one", "two")]
    for pipeline in (made, *loaded):
        proven_once(pipeline, **call).prove()
    assert len(proofs) == 1


def test_a_failure_is_not_kept_and_a_warning_is_given_again(
    proofs: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: Recording, _seed: int = 0) -> Any:
        raise RecordingError("no")

    with monkeypatch.context() as patch:
        patch.setattr(Recording, "prove", fail)
        with pytest.raises(RecordingError):
            proven_once(mute()).prove()
    for _ in range(2):
        recording = proven_once(mute())
        with pytest.warns(UserWarning, match="are its weights untrained"):
            proof = recording.prove()
        assert recording.proof is proof
    assert len(proofs) == 1


def test_a_network_without_a_configuration_is_recorded_each_time(recorded: list[Any]) -> None:
    for layout in ("first", "last"):
        proven_once(synthetic(Traits(layout=layout)), prompt="a dog")
    assert len(recorded) == 2
