"""A pipeline that makes its own list of steps: the student is trained on the list that it makes."""

import pytest
from diffusers import StableDiffusion3Pipeline
from tiny_pipelines import tiny_flow

from fewstep.export import ExportError, plan_student
from fewstep.recording import record


class OwnList(StableDiffusion3Pipeline):
    """Passes sigmas whatever its scheduler would make."""

    last = 0.0

    def __call__(
        self, prompt, height=16, width=16, num_inference_steps=8, guidance_scale=7.0, generator=None, output_type="pil"
    ):
        """Call with sigmas that fall ever faster, or evenly down to `last`."""
        steps = range(num_inference_steps)
        if self.last:
            sigmas = [1 - i * (1 - self.last) / max(num_inference_steps - 1, 1) for i in steps]
        else:
            sigmas = [1 - (i / num_inference_steps) ** 2 for i in steps]
        sizes = {"height": height, "width": width, "max_sequence_length": 8}
        return super().__call__(
            prompt, guidance_scale=guidance_scale, sigmas=sigmas, generator=generator, output_type=output_type, **sizes
        )


def teacher(last):
    stock = tiny_flow(shift=1.0)
    pipeline = OwnList(**stock.components)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.last = last
    return record(pipeline, prompt="the cat")


@pytest.mark.parametrize("renoise", ["ode", "fresh"])
def test_own_list_is_kept_and_said(renoise):
    plan = plan_student(teacher(0.0), 4, renoise=renoise)
    assert plan.grid == pytest.approx((1, 0.9375, 0.75, 0.4375), abs=1e-6)
    assert "makes its own grid" in plan.note
    assert plan.counts == (1, 2, 3, 4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_even_sigmas_down_to_a_small_one_are_stretched(shift):
    plan = plan_student(teacher(0.001), 4, shift=shift)
    assert plan.grid == pytest.approx([shift * i / (4 + (shift - 1) * i) for i in (4, 3, 2, 1)], abs=1e-6)
    assert plan.scheduler.config.shift_terminal == pytest.approx(plan.grid[-1])


def test_a_pipeline_that_no_candidate_serves_is_refused_with_each_reason():
    class Picky(OwnList):
        def __call__(self, prompt, num_inference_steps=8, guidance_scale=7.0, generator=None, output_type="pil"):
            if not getattr(self.scheduler.config, "mine", False):
                raise ValueError("only my own scheduler serves")
            return super().__call__(prompt, 16, 16, num_inference_steps, guidance_scale, generator, output_type)

    pipeline = Picky(**tiny_flow(shift=1.0).components)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.register_to_config(mine=True)
    recording = record(pipeline, prompt="the cat")
    with pytest.raises(ExportError, match="only my own scheduler serves") as caught:
        plan_student(recording, 2)
    assert "\n" not in str(caught.value)
