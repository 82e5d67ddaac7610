"""A teacher under guidance as methods have it says what its own pipeline hands to the scheduler in a guided step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_image
from guided_pictures import PlacedPictures, ThreeAnswers, guided_items, guided_pictures
from tiny_pipelines import tiny_stable_diffusion

from fewstep.conditioning.ragged import join, with_others
from fewstep.data.fingerprint import teacher_digest
from fewstep.diffusion.prediction import expand, from_x0, to_x0
from fewstep.diffusion.rescaling import Rescaling
from fewstep.errors import UserError
from fewstep.networks.guidance import GuidedDenoiser, guide
from fewstep.programs.methods import method_class
from fewstep.programs.planning.dry_run import DryRun
from fewstep.programs.workbench import open_workbench
from fewstep.recording import record
from fewstep.recording.proof.runs import each, relative_error, run
from fewstep.recording.second.switch import switched
from fewstep.recording.watch.shake import shaken
from tests.guided_teachers import guided_teacher

pytestmark = pytest.mark.usefixtures("texts_as_they_are")


def furthest(pipeline: Any, items: list[dict[str, Any]] | None = None, asked: int | None = None, **call: Any) -> float:
    """The error of the guided teacher's answer in any step of a guided walk, relative to the pipeline's own.

    Also beside another sample, under other further answers: each sample has its own. For each sample the network is
    ``asked`` for so many answers, by default all.
    """
    recording = record(pipeline, **call, **({} if items is None else {"items": items}))
    _, guided = guided_teacher(recording, call)
    assert guided.calls == (asked or recording.further + 1) >= 2
    schedule, kind = recording.schedule, recording.prediction_type
    item, other = recording.invocation.item, getattr(recording.invocation, "other", None)
    told = each(recording, [item])[0]
    negative = recording.negative()
    further = recording.negative_each([item])[0] if items else () if negative is None else (negative,)
    told = with_others(told, further)
    beside = told
    if items:
        beside = with_others(each(recording, [other])[0], recording.negative_each([other])[0])
    own = {name: recording.invocation.default(name) for name in recording.off}
    errors = []
    seen = run(recording, [item], 3, changes=own).steps[1:]
    second = recording.recipe.second
    for step in seen:
        if second is not None and second.switch is not None:
            # Its teacher switches by the time of as many steps as it was recorded with.
            ((timestep, on),) = switched(second, [step])
            if second.switch.on(torch.tensor([timestep])).item() != on:
                continue
        t = schedule.time(torch.tensor([step.timestep], dtype=torch.float64))
        x_t = step.network_input[:1].double() / expand(schedule.input_scale(t), step.network_input[:1].double())
        with torch.no_grad():
            alone, both = guided(x_t, t, told), guided(torch.cat([x_t, x_t]), t.expand(2), join([told, beside]))
        answers = [from_x0(x0, kind, x_t, schedule, t) for x0 in (alone, both[:1])]
        read = recording.recipe.read
        errors += [relative_error(answer[:, read], step.model_output[:1][:, read]) for answer in answers]
    assert len(errors) >= 2
    return max(errors)


@pytest.mark.parametrize("way", ["one_call", "rescaled", "deviation", "plus_one", "drawn"])
def test_synthetic_teachers(way: str) -> None:
    assert furthest(guided_pictures(way=way), guided_items(), guidance_scale=4.0) <= 1e-5


def test_synthetic_teachers_of_three_answers_and_of_a_scale_for_each_place() -> None:
    for image, asked in ((1.25, 3), (1.0, 2)):  # what has no weight is not asked for
        call = {"guidance_scale": 6.0, "image_guidance_scale": image}
        assert furthest(guided_pictures(ThreeAnswers), guided_items(ThreeAnswers), asked, **call) <= 1e-5
    pipeline = guided_pictures(PlacedPictures, "dropped")
    assert furthest(pipeline, guided_items(PlacedPictures), max_guidance_scale=2.5) <= 1e-5


@pytest.mark.soak
@pytest.mark.parametrize("name", zoo_image.TRAINED)
def test_teachers_that_look_at_a_picture(name: str) -> None:
    assert furthest(zoo_image.load(name), zoo_image.items_of(name), **zoo_image.call_of(name)) <= 1e-5


# --- rescaled guidance ------------------------------------------------------------------------------------------------


def test_a_text_teacher_whose_call_rescales_its_guidance(tmp_path: Path) -> None:
    """In a run and in its plan; pairs of a teacher that was guided by the plain sum are another one's."""
    pipeline, call = tiny_stable_diffusion(), {"guidance_scale": 5.0, "guidance_rescale": 0.7}
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    told = {"prompts": str(tmp_path / "prompts.txt"), "call": call, "out": str(tmp_path / "run")}
    config = method_class("dmd2").Config(teacher="t", cpu=True, report_to="none", **told)
    with shaken(pipeline.unet):
        assert furthest(pipeline, prompt="a cat", **call) <= 1e-5
        bench = open_workbench(config, "cpu", pipeline)
        checks = {check.name: check.error for check in bench.recording.prove().checks}
    assert checks["guided, one sample, combined"] <= 1e-6
    report = bench.recording.guidance
    assert report.rescaling == Rescaling("deviation", 0.7)
    assert "standard deviation by a share of 0.7" in report.describe()
    for one in (bench, DryRun(config, "dmd2", bench.recording)):
        assert one.guided(one.make_roles()["teacher"]).rescaling == report.rescaling
    plain = replace(bench.recording, guidance=replace(report, weighing=None))
    assert teacher_digest(bench.recording).keys() - teacher_digest(plain).keys() == {"guidance"}


@pytest.mark.soak
def test_a_text_teacher_that_rescales_always(zoo: Any) -> None:
    from diffusers import DiffusionPipeline

    if not (zoo / "QwenImage").is_dir():
        pytest.skip("needs QwenImage of a folder of tiny pipelines")
    pipeline = DiffusionPipeline.from_pretrained(zoo / "QwenImage", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "negative_prompt": " ", "true_cfg_scale": 4.0, "height": 32, "width": 32}
    assert furthest(pipeline, **call) <= 1e-5


@pytest.mark.parametrize("way", ["rescaled", "deviation"])
def test_a_pair_makes_the_rescaled_answer_at_its_own_scale(way: str) -> None:
    recording = record(guided_pictures(way=way), items=guided_items(), guidance_scale=4.0)
    role, guided = guided_teacher(recording, {"guidance_scale": 4.0})
    told = with_others(recording.condition(items=guided_items()[:1]), recording.negative_each(guided_items()[:1])[0])
    x, t = torch.randn(1, *recording.sample_shape), torch.tensor([0.6], dtype=torch.float64)
    with torch.no_grad():
        positive, negative = guided.pair(x, t, told)
        wanted, alone = guided(x, t, told), role(x, t, told)
        plain = GuidedDenoiser(role, 4.0, guided.further)(x, t, told)
    torch.testing.assert_close(positive, alone)
    torch.testing.assert_close(guide(positive, negative, guided.scale_at(t, x)), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - plain).abs().max() > 1e-2


def test_rescaled_guidance_of_another_answer_than_the_networks_is_refused() -> None:
    recording = record(guided_pictures(way="rescaled"), items=guided_items(), guidance_scale=4.0)
    role, guided = guided_teacher(recording, {"guidance_scale": 4.0})
    denoiser = role.single.denoiser
    told = with_others(recording.condition(items=guided_items()[:1]), recording.negative_each(guided_items()[:1])[0])
    x, t = torch.randn(1, *recording.sample_shape), torch.tensor([0.6], dtype=torch.float64)
    assert denoiser.prediction_type == "flow"
    with torch.no_grad():  # of which the velocity is the answer itself
        velocity = guided.of(denoiser.velocity)(x, t, told)
        x0 = to_x0(velocity, "flow", x, recording.schedule, t)
        torch.testing.assert_close(x0, guided(x, t, told), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"guided sum is brought to the positive's norm .* this method guides others"):
        guided.of(lambda x_t, t, conditioning, end=None: x_t)
    guided.of(lambda x_t, t, conditioning, end=None: x_t, 1.0)
