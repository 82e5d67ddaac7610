"""SiD's loss: a Gaussian with a closed form, the equal forms of other parameterisations, and what its weights are."""

import math

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from fewstep.diffusion.prediction import add_noise, from_x0
from fewstep.diffusion.schedule import Coefficients, EDMSchedule, FlowSchedule, NoiseSchedule, TableSchedule
from fewstep.losses.score_identity import WEIGHTINGS, mean_score_identity, score_identity, score_identity_weight


def triple(shape: tuple[int, ...] = (4, 3, 5, 5)) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(3, *shape, dtype=torch.float64))


# --- data N(0, 1), the student s z + shift, sigma = noise level, exact networks, weight 1 -----------------------------


def gaussian_gradients(s: float, sigma: float, alpha: float, shift: float = 0.0, detached: str = "") -> list[float]:
    """d loss / ds and d loss / d shift, exactly: the loss is a polynomial of degree 2 in the two normals."""
    nodes, weights = (torch.from_numpy(a) for a in hermegauss(4))
    weights = weights / weights.sum()
    z, noise = (grid.reshape(-1, 1) for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    share = torch.outer(weights, weights).flatten()
    width, offset = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (s, shift))
    x0 = width * z + offset
    x_t = x0 + sigma * noise
    teacher = x_t / (1 + sigma**2)
    critic = shift + s**2 * (x_t - shift) / (s**2 + sigma**2)  # of the present student, without gradient to its s
    teacher = teacher.detach() if "teacher" in detached else teacher
    critic = critic.detach() if "critic" in detached else critic
    loss = (share.reshape(-1, 1) * score_identity(x0, teacher, critic, alpha, torch.ones(len(x0)))).sum()
    return [float(g) for g in torch.autograd.grad(loss, (width, offset))]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("s", [0.2, 0.5, 1.0, 5.0])
def test_the_gradient_of_a_gaussian_is_the_closed_form(s: float, sigma: float, alpha: float):
    numerator = -2 * s * sigma**4 * (1 - s**2) * ((s**2 + sigma**2) + alpha * (1 - s**2))
    expected = numerator / ((1 + sigma**2) ** 2 * (s**2 + sigma**2) ** 2)
    assert gaussian_gradients(s, sigma, alpha)[0] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("s", "alpha", "gradient"),
    [(0.5, 0.5, -0.1050), (0.5, 1.0, -0.1500), (0.5, 1.2, -0.1680), (5.0, 1.0, 0.0188), (5.0, 1.2, -0.0535)],
)
def test_a_wide_student_is_pushed_the_wrong_way_above_alpha_one(s: float, alpha: float, gradient: float):
    """A descent step moves s against the gradient: 0.5 must grow, 5 must shrink, and at alpha 1.2 it does not."""
    assert gaussian_gradients(s, 0.5, alpha)[0] == pytest.approx(gradient, abs=1e-4)


def test_alpha_one_half_is_half_the_true_fisher_divergence():
    s, sigma = 0.6, 0.8

    def fisher(s: Tensor) -> Tensor:
        """E (x0_teacher - x0_critic)^2 under the student's own noised samples, the critic following the student."""
        variance = s**2 + sigma**2
        return (1 / (1 + sigma**2) - s**2 / variance) ** 2 * variance

    width = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(fisher(width), width)
    assert gaussian_gradients(s, sigma, 0.5)[0] == pytest.approx(0.5 * expected.item(), rel=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_the_gradient_of_a_shift_does_not_depend_on_alpha(alpha: float):
    sigma, shift = 0.7, 0.9
    expected = sigma**4 * shift / (1 + sigma**2) ** 2
    assert gaussian_gradients(1.0, sigma, alpha, shift)[1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("detached", ["teacher", "critic", "teacher and critic"])
def test_the_gradient_flows_through_both_networks(detached: str):
    through, around = (gaussian_gradients(0.5, 0.5, 1.2, detached=some)[0] for some in ("", detached))
    assert through == pytest.approx(-0.1680, abs=1e-4)
    assert abs(around - through) > 0.01


# --- forms ------------------------------------------------------------------------------------------------------------


def test_at_alpha_one_it_is_the_difference_times_the_critics_error():
    x0, teacher, critic = triple()
    loss = score_identity(x0, teacher, critic, 1.0, torch.ones(4))
    torch.testing.assert_close(loss, (teacher - critic) * (critic - x0))


SCHEDULES: dict[str, tuple[NoiseSchedule, str]] = {
    "epsilon": (TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0)), "epsilon"),
    "v": (TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0)), "v_prediction"),
    "flow": (FlowSchedule(), "flow"),
    "edm": (EDMSchedule(), "sample"),
}


@pytest.mark.parametrize(("schedule", "kind"), SCHEDULES.values(), ids=SCHEDULES)
def test_it_is_the_same_loss_in_the_networks_own_space(schedule: NoiseSchedule, kind: str):
    """The factor of (p - q)((p - x0) - alpha (p - q)) is the square of what turns the raw output into x0."""
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    x0, teacher, critic = triple()
    coefficients = schedule.coefficients(t)
    x_t = add_noise(x0, torch.randn_like(x0), coefficients)
    own, raw_teacher, raw_critic = (from_x0(x, kind, x_t, schedule, t) for x in (x0, teacher, critic))
    factor = {
        "epsilon": (coefficients.sigma / coefficients.alpha) ** 2,
        "v_prediction": coefficients.sigma**2,
        "flow": coefficients.sigma**2,
        "sample": torch.ones(4),
    }[kind]
    difference = raw_teacher - raw_critic
    expected = factor.reshape(-1, 1, 1, 1) * difference * ((raw_teacher - own) - 1.2 * difference)
    torch.testing.assert_close(score_identity(x0, teacher, critic, 1.2, torch.ones(4)), expected)


def test_means_are_those_of_the_elements():
    x0, teacher, critic = triple()
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0])
    expected = score_identity(x0, teacher, critic, 1.2, weight).mean((1, 2, 3))
    torch.testing.assert_close(mean_score_identity(x0, teacher, critic, 1.2, weight), expected)


# --- weights ----------------------------------------------------------------------------------------------------------


def weights(name: str, sigma: list[float], **more) -> Tensor:
    x0, teacher, _ = (x.requires_grad_() for x in triple((len(sigma), 3, 5, 5)))
    sigma_t = torch.tensor(sigma, dtype=torch.float64)
    weight = score_identity_weight(name, x0, teacher, Coefficients(1 - sigma_t, sigma_t), **more)
    assert weight.shape == (len(sigma),)
    assert not weight.requires_grad
    return weight


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", [1.0, 1.0]),
        ("1_minus_sigma", [0.75, 0.2]),
        ("1_minus_sigma_squared", [0.5625, 0.04]),
        ("1_over_sigma", [4.0, 1.25]),
        ("1_over_sigma2", [16.0, 1.5625]),
        ("snr_sqrt", [3.0, 0.25]),
        ("snr", [9.0, 0.0625]),
    ],
)
def test_weights_that_are_functions_of_sigma(name: str, expected: list[float]):
    torch.testing.assert_close(weights(name, [0.25, 0.8]), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_weight_is_finite_at_both_ends(name: str):
    assert weights(name, [0.0, 1.0]).isfinite().all()


def test_sids_weight_is_one_over_the_mean_error_of_the_teacher():
    x0, teacher, _ = triple()
    one = torch.ones(4)
    weight = score_identity_weight("sid", x0, teacher, Coefficients(one, one))
    torch.testing.assert_close(weight, 1 / (x0 - teacher).abs().mean((1, 2, 3)))
    assert score_identity_weight("sid", x0, x0, Coefficients(one, one)).tolist() == pytest.approx([1e5] * 4)
    assert score_identity_weight("sid", x0, x0, Coefficients(one, one), normalizer_min=0.0).tolist() == [0.0] * 4


def test_the_weight_is_the_samples_own_and_gets_no_gradient():
    x0, teacher, critic = triple()
    factors = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    plain = score_identity(x0, teacher, critic, 0.7, torch.ones(4))
    torch.testing.assert_close(
        score_identity(x0, teacher, critic, 0.7, factors.detach()), plain * factors.detach().reshape(-1, 1, 1, 1)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype):
    x0, teacher, critic = (x.to(dtype) for x in triple())
    loss = score_identity(x0, teacher, critic, 1.0, torch.ones(4, dtype=torch.float64))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, score_identity(x0.float(), teacher.float(), critic.float(), 1.0, torch.ones(4)))
    one = torch.ones(4, dtype=torch.float64)
    assert score_identity_weight("sid", x0, teacher, Coefficients(one, one)).dtype == torch.float32


def test_an_unknown_weighting_is_named():
    with pytest.raises(ValueError, match="unknown weighting 'nil'"):
        weights("nil", [0.5])


def test_the_forms_agree_that_a_perfect_critic_of_a_perfect_student_costs_nothing():
    x0, teacher, _ = triple()
    assert not score_identity(x0, teacher, teacher, 1.2, torch.full((4,), math.pi)).any()
