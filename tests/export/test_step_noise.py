"""A fresh-noise student in a user's hands: its seeds, alone and in a batch, and with stock diffusers."""

import copy
import functools
import inspect
import json

import numpy as np
import pipeline_folder
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import TINY

import fewstep
from fewstep.export import ExportError, plan_student
from fewstep.export.about import student_class
from fewstep.export.step_noise import step_noise_from
from fewstep.recording import record
from fewstep.recording.pipeline import find_scheduler, with_parts


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "zoo_name" in metafunc.fixturenames:
        metafunc.parametrize("zoo_name", pipeline_folder.names(metafunc.config, sample=False, short=False))


def loaded(recording, steps=2):
    """The pipeline that fewstep.load gives of a fresh-noise student, and its plan."""
    plan = plan_student(recording, steps, renoise="fresh")
    name = find_scheduler(recording.pipeline)
    pipeline = with_parts(recording.pipeline, **{name: copy.deepcopy(plan.scheduler)})
    about = {"call": plan.call, "counts": plan.counts, "renoise": plan.renoise}
    pipeline.__class__ = student_class(type(pipeline), about)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, plan


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sampled(pipeline, recording, seeds, **more):
    """Samples (B, ...) of the recording's own prompt or label, one for each seed."""
    own = {"prompt": "prompt", "label": "class_labels"}.get(recording.conditional)
    subject = {own: [recording.invocation.item] * len(seeds)} if own else {"batch_size": len(seeds)}
    output = pipeline(**subject, generator=generators(*seeds), output_type="np", **more)
    return np.stack([np.asarray(image) for image in output[0]])


def check_a_batch_is_its_samples(recording, tolerance=1e-5):
    pipeline, plan = loaded(recording)
    torch.manual_seed(11)
    batch = sampled(pipeline, recording, [3, 4, 5])
    torch.manual_seed(12)  # another global seed is of no importance
    alone = np.concatenate([sampled(pipeline, recording, [seed]) for seed in (3, 4, 5)])
    assert np.abs(batch - alone).max() < tolerance
    assert np.abs(batch[0] - batch[1]).max() > 1e-3
    assert "step" not in vars(getattr(pipeline, find_scheduler(pipeline)))
    return pipeline, plan, alone


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("ddim", "edm")])
def test_a_batch_is_its_samples(recorded, name):
    check_a_batch_is_its_samples(recorded(name))


@pytest.mark.soak
def test_a_batch_is_its_samples_in_every_family(zoo_name, zoo):
    pipeline = DiffusionPipeline.from_pretrained(zoo / zoo_name)
    pipeline.set_progress_bar_config(disable=True)
    recording = record(pipeline, **pipeline_folder.call_of(zoo, zoo_name, pipeline))
    try:
        plan_student(recording, 2, renoise="fresh")
    except ExportError as error:
        pytest.skip(str(error))
    check_a_batch_is_its_samples(recording, tolerance=3e-4)  # rounding: 7e-5 at CogVideoX, whose images are extreme


@pytest.mark.parametrize("name", ["flow", "dit"])
def test_the_cards_line_does_it_in_stock_code(recorded, name):
    recording = recorded(name)
    _, plan, alone = check_a_batch_is_its_samples(recording)
    assert plan.noise_follows == "global seed"
    stock = with_parts(recording.pipeline, **{find_scheduler(recording.pipeline): copy.deepcopy(plan.scheduler)})
    own = {"prompt": "prompt", "label": "class_labels"}[recording.conditional]
    subject = {own: [recording.invocation.item] * 3}
    for _ in range(2):  # the line is repeated for other generators
        generator = generators(3, 4, 5)
        stock.scheduler.step = functools.partial(stock.scheduler.step, generator=generator)
        output = stock(**subject, **plan.call, generator=generator, output_type="np")
        assert np.abs(np.stack([np.asarray(image) for image in output[0]]) - alone).max() < 1e-5


def test_one_generator_serves_the_whole_batch_and_none_leaves_the_global_one(recorded):
    recording = recorded("flow")
    pipeline, _ = loaded(recording)

    def image(generator, seed):
        torch.manual_seed(seed)
        return pipeline(["the cat", "dog"], generator=generator, output_type="np").images

    one, again = (image(torch.Generator().manual_seed(3), seed) for seed in (0, 1))
    assert np.array_equal(one, again)
    assert np.array_equal(image(None, 5), image(None, 5))
    assert not np.array_equal(image(None, 5), image(None, 6))


def test_the_signature_of_step_is_seen_by_the_pipeline(recorded):
    pipeline, _ = loaded(recorded("flow"))
    before = inspect.signature(pipeline.scheduler.step)
    with pytest.raises(RuntimeError, match="stop"), step_noise_from(pipeline, generators(0)):
        assert inspect.signature(pipeline.scheduler.step) == before
        raise RuntimeError("stop")
    assert "step" not in vars(pipeline.scheduler)


def test_an_ode_student_keeps_its_scheduler_as_it_is(recorded):
    recording = recorded("flow")
    plan = plan_student(recording, 2, renoise="ode")
    pipeline = with_parts(recording.pipeline, scheduler=copy.deepcopy(plan.scheduler))
    pipeline.__class__ = student_class(type(pipeline), {"call": plan.call, "counts": plan.counts, "renoise": "ode"})
    seen = []
    pipeline(
        "the cat",
        generator=generators(0),
        callback_on_step_end=lambda pipe, *_: seen.append(vars(pipe.scheduler)) or {},
    )
    assert seen and all("step" not in own for own in seen)


@pytest.mark.parametrize("how", [{"num_inference_steps": 1}, {"sigmas": [1.0]}])
def test_one_step_of_a_stretched_grid_is_refused(recorded, trained, tmp_path, how):
    # It divides zero by zero: an image of NaN.
    recording = recorded("flow")
    plan = plan_student(recording, 4, renoise="fresh")
    assert plan.scheduler.config.shift_terminal and 1 not in plan.counts
    folder = fewstep.export.export_student(
        recording, trained(recording), plan, tmp_path / "s", method="dmd2", base_model="example/teacher"
    )
    about = json.loads((folder / "fewstep.json").read_text())
    pipeline = fewstep.load(folder)
    with pytest.raises(ExportError, match="2, 3, 4") as caught:
        pipeline("the cat", **how)
    assert "\n" not in str(caught.value)
    assert about["counts"] == [2, 3, 4]
    assert "NaN" in (folder / "README.md").read_text()


def test_one_step_is_right_where_the_grid_is_not_stretched(recorded):
    recording = recorded("flow")
    plan = plan_student(recording, 4, renoise="ode")
    assert 1 in plan.counts and plan.grids[1] == (1.0,)
    one = plan_student(recording, 1, renoise="fresh")
    assert one.scheduler.config.get("shift_terminal") is None
