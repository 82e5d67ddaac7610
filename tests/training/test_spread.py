"""What is said of how samples vary."""

import pytest
import torch

from fewstep.training.spread import beside, spread


def test_samples_of_one_colour_vary_between_and_not_within() -> None:
    colours = torch.randn(8, 4, 1, 1)
    of_one_colour = spread(colours.expand(8, 4, 6, 6))
    assert of_one_colour["within"] == pytest.approx(0, abs=1e-9)
    assert of_one_colour["between"] == pytest.approx(colours.std(0).mean().item())
    alike = spread(torch.randn(1, 4, 6, 6).expand(8, 4, 6, 6))
    assert alike["between"] == pytest.approx(0, abs=1e-9) and alike["within"] > 0.5


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 2, 4, 5), (20,), (3, 20), (20, 3)])
def test_white_noise_varies_by_one_everywhere(shape: tuple[int, ...]) -> None:
    found = spread(torch.randn(4000, *shape))
    # Of few places the mean of standard deviations is below 1: at 3 by 0.886.
    assert found["std"] == pytest.approx(1, rel=0.02) and found["between"] == pytest.approx(1, rel=0.02)
    assert 0.85 < found["within"] < 1.02


def test_tokens_and_sound_that_are_constant_along_their_places_do_not_vary_within() -> None:
    values = torch.randn(8, 3)
    assert spread(values[:, None].expand(8, 20, 3))["within"] == pytest.approx(0, abs=1e-9)
    assert spread(values[:, :, None].expand(8, 3, 20))["within"] == pytest.approx(0, abs=1e-9)


def test_both_are_logged_beside_their_distance() -> None:
    teacher = torch.randn(8, 3, 4, 4)
    found = beside(2 * teacher, teacher)
    assert found["samples/student_std"] == pytest.approx(2 * found["samples/teacher_std"])
    assert found["samples/apart"] == pytest.approx(teacher.square().mean().sqrt().item())
