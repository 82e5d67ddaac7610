"""Students of teachers that look at a picture: their own walk is the stock pipeline's, with the call on the card."""

from __future__ import annotations

import functools
import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import zoo_image
from torch import Tensor, nn

import fewstep
from fewstep.conditioning.conditioning import Conditioning
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.export import export_student, plan_student
from fewstep.export.walk.control import as_walked
from fewstep.export.walk.plan import StudentPlan
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.recording import Recipe, Recording, record
from fewstep.recording.call.invocation import SCALES
from tests.stock_process import PLAIN_TEXTS, WATCH, allowed, run_stock

pytestmark = pytest.mark.usefixtures("texts_as_they_are", "small_references")
SOAK = pytest.mark.soak
COUNTS = (1, 2, 4)
#: Its control is switched off before the second half of a walk, and so in the only step of one.
NEVER_AT_ONE = zoo_image.CONTROLLED
#: What a walk is off beside that: the first time of its scheduler is 1000.0001 in float32, of which sines are taken.
ROUNDED_TIMES = {"QwenImageEditPlus": 1e-5}

# Runs the code of a card in a folder that holds its pictures, and keeps where the scheduler starts and ends.
_CARD = f"""{WATCH}{PLAIN_TEXTS}{zoo_image.SMALL_REFERENCES}
import os, sys
import numpy, torch, diffusers
code, place, scheduler, out = sys.argv[1:]
os.chdir(place)
seen = watch(getattr(diffusers, scheduler))
exec(code)
numpy.savez(out, first=seen[0][0].float().numpy(), last=seen[-1][1].float().numpy(), steps=len(seen))
"""


@dataclass(eq=False)
class Exported:
    """A student with changed weights, in its folder."""

    recording: Recording
    network: nn.Module
    plan: StudentPlan
    folder: Path
    items: list[dict[str, Any]]
    counts: tuple[int, ...]
    rounded: float

    def allowed(self, first: Tensor, last: Tensor) -> float:
        """How far its own walk may end from the stock pipeline's last sample, relative."""
        return allowed(first, last) + self.rounded

    def sample(self, told: Conditioning, first: Tensor, count: int) -> Tensor:
        """What fewstep's own loop makes of the first samples (B, ...); 0 where the network is told nothing."""
        recording, plan = self.recording, self.plan
        recipe = self.recipe(count)
        denoiser = NetworkDenoiser(self.network, recipe, recording.schedule, recording.prediction_type)
        sampler = Sampler(recording.schedule, plan.grids[count], plan.renoise, plan.initial_scale)
        with torch.no_grad():
            return rollout(denoiser, sampler, first / plan.initial_scale, told)

    @functools.cache  # noqa: B019  # it lives as long as its module
    def recipe(self, count: int) -> Recipe:
        """The recipe, a control network switched as in a walk of the student."""
        if self.recording.recipe.second is None:
            return self.recording.recipe
        pipeline = fewstep.load(self.folder)
        pipeline.set_progress_bar_config(disable=True)
        return as_walked(self.recording, pipeline, self.plan.call, count).recipe


@pytest.fixture(scope="module", params=zoo_image.first_is_quick(zoo_image.TRAINED))
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    name = request.param
    pipeline, items = zoo_image.load(name), zoo_image.items_of(name)
    recording = record(pipeline, items=items, **zoo_image.call_of(name))
    plan = plan_student(recording, 4, renoise="ode")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = type(recording.network).from_config(recording.network.config).eval()
        network.load_state_dict({k: v + 0.02 * torch.randn_like(v) for k, v in recording.network.state_dict().items()})
    folder = tmp_path_factory.mktemp(name) / "student"
    export_student(recording, network, plan, folder, method="dmd2", base_model="example/teacher")
    counts = COUNTS if name != NEVER_AT_ONE else COUNTS[1:]
    return Exported(recording, network, plan, folder, items, counts, ROUNDED_TIMES.get(name, 0.0))


def stock(pipeline: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The first sample of a pipeline's scheduler and the last."""
    kind, seen = type(pipeline.scheduler), []
    step = kind.step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = step(self, *args, **kwargs)
        sample = inspect.signature(step).bind(self, *args, **kwargs).arguments["sample"]
        seen.append((sample.clone(), found[0] if isinstance(found, tuple) else found.prev_sample))
        return found

    watched.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]  # pipelines look at it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "step", watched)
        torch.manual_seed(0)
        pipeline(**arguments, generator=torch.Generator().manual_seed(0), output_type="pt")
    return seen[0][0], seen[-1][1]


def off(recording: Recording, own: Tensor, wanted: Tensor) -> float:
    """Relative, where the network is told the sample."""
    read, shape = recording.recipe.read, (len(own), *recording.sample_shape)
    own, wanted = own.reshape(shape)[:, read], wanted.reshape(shape)[:, read]
    return float((own - wanted).abs().max() / wanted.abs().max())


def test_the_walk_is_the_stock_pipelines_for_each_picture(student: Exported) -> None:
    recording, pipeline = student.recording, fewstep.load(student.folder)
    pipeline.set_progress_bar_config(disable=True)
    told = [recording.condition(items=[item]) for item in student.items]
    shape = (1, *recording.sample_shape)
    assert set(student.counts) == set(COUNTS) & set(student.plan.counts)
    for count in student.counts:
        for own, item in zip(told, student.items, strict=True):
            first, last = stock(pipeline, {**item, "num_inference_steps": count})
            assert off(recording, student.sample(own, first.reshape(shape), count), last) <= student.allowed(
                first, last
            )
            # Told another item's picture, which is what a mixed-up cache would do, it is another sample.
            (other,) = [one for one in told if one is not own]
            assert off(recording, student.sample(other, first.reshape(shape), count), last) >= 1e-3
        both = student.sample(Conditioning.cat(told), first.reshape(shape).expand(2, *shape[1:]), count)
        alone = torch.cat([student.sample(one, first.reshape(shape), count) for one in told])
        assert off(recording, both, alone) <= 1e-5


def test_the_cards_code_samples_it_where_fewstep_is_not_installed(student: Exported, tmp_path: Path) -> None:
    card = (student.folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", card, flags=re.DOTALL)
    for name, picture in student.items[0].items():
        if name != "prompt":
            several = isinstance(picture, list)
            for number, one in enumerate(picture if several else [picture], start=1):
                one.save(tmp_path / (f"{name}_{number}.png" if several else f"{name}.png"))
    out = tmp_path / "seen.npz"
    code = code.replace("path/to/this/folder", str(student.folder))
    run_stock(_CARD, code, str(tmp_path), type(student.plan.scheduler).__name__, str(out))
    seen = numpy.load(out)
    assert seen["steps"] == student.plan.steps
    first = torch.from_numpy(seen["first"]).reshape(1, *student.recording.sample_shape)
    told = student.recording.condition(items=student.items[:1])
    own, last = student.sample(told, first, student.plan.steps), torch.from_numpy(seen["last"])
    assert off(student.recording, own, last) <= student.allowed(first, last)


def test_the_folder_says_what_is_given_and_what_is_filled_in(student: Exported) -> None:
    about = json.loads((student.folder / "fewstep.json").read_text())
    assert about["conditional"] == "item" and about["inputs"] == student.recording.inputs
    assert about["example"] == {name: value for name, value in student.items[0].items() if name == "prompt"}
    assert not about["inputs"].keys() & {*about["call"], *about["untrained_pictures"]}
    assert "negative_prompt" not in about["call"]
    scales = {name: value for name, value in about["call"].items() if name.endswith(SCALES)}
    assert scales and set(scales.values()) == {1.0}
    assert about["call"].get("strength", 1.0) == 1.0
    card = (student.folder / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` | {form} |" in card for name, form in about["inputs"].items())
    assert "image-to-" in card


def test_a_call_without_its_picture_is_warned_of() -> None:
    from fewstep.export.heeded import what_is_untrained

    inputs = {"prompt": "text", "image": "picture RGB 32x32"}
    assert what_is_untrained({"prompt": "a", "image": object()}, ["pose"], inputs) is None
    assert "trained with image" in str(what_is_untrained({"prompt": "a"}, ["pose"], inputs))
    told = what_is_untrained({"prompt": "a", "image": object(), "pose": object()}, ["pose"], inputs)
    assert "trained without these, so what it makes of pose" in str(told)
