"""MDT-dist's own class: closed forms of a Gaussian, what gets a gradient, sparse samples, and refusals."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import TABLE, TinyNetwork, every_kind_of_teacher, labels, role

from fewstep.conditioning.conditioning import Conditioning, Leaf
from fewstep.data.batch import Batch, Pairs, Real
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.prediction import expand
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule
from fewstep.errors import UserError
from fewstep.losses.present import mean_over_present, of_present, present_entries
from fewstep.losses.trig_flow import normalized
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import NetworkRole
from fewstep.programs.module import ModuleRecipe
from fewstep.trainers.mdt_dist import MdtDist, MdtDistConfig

FLOW = FlowSchedule()
S = 0.6  # of the Gaussian data


def config(**settings) -> MdtDistConfig:
    return MdtDistConfig(teacher="tiny", out="out", **settings)


class Velocity(nn.Module):
    """The exact velocity of N(0, S^2) under flow matching, moved by ``off``."""

    def __init__(self) -> None:
        super().__init__()
        self.off = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def time(self, timestep: Tensor, x: Tensor) -> Tensor:
        return expand(timestep / 1000, x)

    def exact(self, x: Tensor, t: Tensor) -> Tensor:
        return x * (t - (1 - t) * S**2) / ((1 - t) ** 2 * S**2 + t**2)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        t = self.time(timestep, x)
        return (1 + self.off) * self.exact(x, t)


class Average(Velocity):
    """And the average velocity down to the clean sample, which is S x / sqrt((1 - t)^2 S^2 + t^2)."""

    def exact(self, x: Tensor, t: Tensor) -> Tensor:
        return (x - S * x / ((1 - t) ** 2 * S**2 + t**2).sqrt()) / t


def gaussian(settings: MdtDistConfig, student: nn.Module | None = None) -> MdtDist:
    networks = {"teacher": Velocity(), "student": student or Average()}
    roles = {n: NetworkRole(n, NetworkDenoiser(net, ModuleRecipe(), FLOW, "flow")) for n, net in networks.items()}
    guided = GuidedDenoiser(roles["teacher"], 1.0, further=0)
    return MdtDist(settings, roles, guided, guided, Sampler(FLOW, (1.0,), "ode"))


def samples(count: int = 16, step: int = 0) -> Batch:
    x0 = S * torch.randn(count, 2, 2, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    nothing = Conditioning({}, count)
    return Batch(count, tuple(x0.shape[1:]), nothing, Draws(0, step, range(count)), Real(x0, nothing), False)


def vectors(settings: MdtDistConfig, schedule: NoiseSchedule = FLOW, kind: str = "flow", scales=(1.0, 1.0)) -> MdtDist:
    """Over vectors of 6 with labels."""
    torch.manual_seed(0)
    roles = {name: role(name, TinyNetwork(6), schedule, kind, name == "student") for name in ("teacher", "student")}
    guided = [GuidedDenoiser(roles["teacher"], scale) for scale in scales]
    return MdtDist(settings, roles, *guided, Sampler(schedule, (1.0, 0.5), "ode", schedule.initial_scale()))


def batch(count: int = 8, step: int = 0) -> Batch:
    x0, told = (
        torch.randn(count, 6, generator=torch.Generator().manual_seed(1)),
        labels([float(k) for k in range(count)], 0.0),
    )
    return Batch(count, (6,), told, Draws(0, step, range(count)), Real(x0, told), False, Pairs(x0, x0, told))


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_the_exact_average_velocity_has_no_error_but_that_of_the_step():
    """With the derivative itself none; with differences one that falls with their step; with its norm a large one."""
    plain = {"data": "images", "sigma_min": 0.0, "normalization": "none", "time_min": 0.05}

    def error(**settings) -> float:
        (turn,) = gaussian(config(**plain | settings)).turns(0, samples())
        return float(turn.log["student/matching"])

    exact = error(derivative="exact")
    backward = [error(derivative_step=step) for step in (0.02, 0.01, 0.005)]
    assert exact < 1e-20
    assert backward[0] > 3 * backward[1] > 9 * backward[2] > 0  # the square of the first order: 4 at a time
    assert error(derivative="central", derivative_step=0.01) < backward[1] / 50
    assert error(derivative="exact", normalization="norm") > 1e-2


def test_a_little_of_the_noise_stays_in_the_cleanest_sample():
    method, given, seen = vectors(config(data="images", sigma_min=0.1)), batch(), []
    method.roles["teacher"].denoiser.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    noise, t = given.draws.normal("noise", (6,)), torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    method.said(given.real.x0, noise, t, given.conditioning, method.teacher)
    alpha, sigma = (1 - t)[:, None], (t + 0.1 * (1 - t))[:, None]
    torch.testing.assert_close(seen[0][:8], (alpha * given.real.x0 + sigma * noise).float(), check_dtype=False)


def test_distillation_starts_where_the_sampler_does():
    method, asked = vectors(config(data="images"), EDMSchedule(), "edm"), []
    one_step = method.one_step
    method.one_step = lambda start, told: (asked.append(start), one_step(start, told))[1]
    next(method.turns(0, batch()))
    torch.testing.assert_close(asked[0], EDMSchedule().initial_scale() * batch().draws.normal("sample_noise", (6,)))


@every_kind_of_teacher
def test_a_sample_of_one_step_is_what_the_student_says_of_the_noise(schedule: NoiseSchedule, kind: str):
    method, given = vectors(config(data="images"), schedule, kind), batch()
    start = schedule.initial_scale() * given.draws.normal("sample_noise", (6,))
    _, x0 = method.one_step(start, given.conditioning)
    said = method.student(start, method.sampler.times(0, start), given.conditioning)
    torch.testing.assert_close(x0, said.detach(), rtol=1e-3, atol=1e-3)


def test_both_terms_count_by_their_weights():
    (turn,) = vectors(config(data="images", matching_weight=0.7, distillation_weight=0.3)).turns(0, batch())
    sizes = [turn.log[f"student/{name}"].item() for name in ("matching", "distillation")]
    assert min(sizes) > 0
    assert [piece.item() for piece, _ in turn.backward] == pytest.approx([0.7 * sizes[0], 0.3 * sizes[1]])


@pytest.mark.parametrize("kind", ["renoise", "central"])
def test_a_difference_is_along_the_line_of_the_sample_or_the_teachers_velocity(kind: str):
    method, given = vectors(config(data="images", derivative=kind, derivative_step=0.05)), batch()
    ways = [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
    at = given.real.x0, torch.full((8,), 0.5, dtype=torch.float64), given.conditioning
    first, other_v, other_line = (
        method.followed(*at, v, line)[1] for v, line in ((ways[0], ways[0]), (ways[1], ways[0]), (ways[0], ways[1]))
    )
    followed, ignored = (other_line, other_v) if kind == "renoise" else (other_v, other_line)
    assert torch.equal(first, ignored) and not torch.equal(first, followed)


def test_distillation_is_at_rest_where_the_fake_is_the_teachers_own():
    """A student that says the average velocity samples the data, for which its own velocity has no error."""
    method = gaussian(config(data="images", sigma_min=0.0, normalization="none", derivative="exact", time_min=0.05))
    (turn,) = method.turns(0, samples())
    (_, _), (distillation, _) = turn.backward
    gradient = torch.autograd.grad(distillation, method.student.network.off)[0]
    assert distillation.item() < 1e-12 and gradient.abs() < 1e-6  # the noise is float32


def test_distillation_moves_samples_by_twice_the_error_of_the_fake_and_is_weighed_by_time():
    student = Average()
    student.off.data += 0.3
    sums = {}
    for weight in ("none", "1-t"):
        method = gaussian(config(data="images", distillation_time_weight=weight), student)
        one = samples()
        (turn,) = method.turns(0, one)
        loss = turn.backward[1][0]
        sums[weight] = torch.autograd.grad(loss, student.off)[0]
        again, t = samples(), method.drawn(samples())
        start = again.draws.normal("sample_noise", again.shape)
        u, x0 = method.one_step(start, again.conditioning)
        torch.testing.assert_close(x0, (start - u).detach())
        fake = method.said(x0, again.draws.normal("noise", again.shape), t, again.conditioning, method.distilled)
        pull = 2 * (fake.u - fake.target).detach() * (expand(1 - t, u) if weight == "1-t" else 1) / u.numel()
        torch.testing.assert_close(sums[weight], torch.autograd.grad((u * pull).sum(), student.off)[0])
    assert abs(sums["1-t"]) < 0.7 * abs(sums["none"])  # times are mostly noisy


def test_times_that_weigh_are_flow_times():
    """Of a table sigma / (alpha + sigma), by which the derivative counts, and the rest of which weighs distillation."""
    found = {}
    for weight in ("none", "1-t"):
        method = vectors(config(data="images", distillation_time_weight=weight), TABLE, "epsilon")
        found[weight] = float(next(method.turns(0, batch(1))).log["student/distillation"])
    alpha, sigma = TABLE.coefficients(method.drawn(batch(1)))
    assert found["1-t"] == pytest.approx(float(alpha / (alpha + sigma)) * found["none"], rel=1e-5)

    plain, targets = vectors(config(data="images", normalization="none"), TABLE, "epsilon"), []
    given, t = batch(), torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    for change in (torch.zeros(8, 6), torch.ones(8, 6)):
        plain.followed = lambda x_t, *_, there=change: (x_t, there)
        noise = batch().draws.normal("noise", (6,))
        targets.append(plain.said(given.real.x0, noise, t, given.conditioning, plain.teacher).target)
    alpha, sigma = TABLE.coefficients(t)
    expected = (sigma / (alpha + sigma))[:, None].expand(8, 6)
    torch.testing.assert_close(targets[0] - targets[1], expected, rtol=1e-3, atol=1e-3, check_dtype=False)


@pytest.mark.parametrize("terms", [{"distillation_weight": 0.0}, {}])
def test_a_gaussian_student_reaches_the_closed_form_from_beside_it(terms: dict):
    student = Average()
    student.off.data += 0.3
    method = gaussian(config(data="images", normalization="none", derivative="exact", **terms), student)
    optimizer = torch.optim.SGD([student.off], lr=0.4)
    for step in range(20):
        (turn,) = method.turns(step, samples(step=step))
        optimizer.zero_grad()
        sum(piece for piece, _ in turn.backward).backward()
        optimizer.step()
    assert abs(student.off.item()) < 0.03
    assert method.roles["teacher"].denoiser.network.off.grad is None


# --- what gets a gradient, and what is asked --------------------------------------------------------------------------


@every_kind_of_teacher
def test_the_student_alone_learns_from_every_kind_of_teacher(schedule: NoiseSchedule, kind: str, tmp_path: Path):
    quiet = {"report_to": "none", "sample_steps": 0, "max_steps": 2}
    method = vectors(config(**quiet, batch_size=4), schedule, kind)
    method.config.out = str(tmp_path)
    (turn,) = method.turns(0, batch())
    assert [piece.requires_grad for piece, _ in turn.backward] == [True, True]
    for piece, _ in turn.backward:
        piece.backward(retain_graph=True)
    assert all(p.grad is None for p in method.roles["teacher"].denoiser.network.parameters())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in method.roles["student"].parameters())


def test_each_term_has_its_own_guidance():
    """Far from the teacher's own answer, so that the two losses say which scale was asked with."""
    plain, guided, other = (vectors(config(), scales=s) for s in ((1.0, 1.0), (4.0, 1.0), (1.0, 4.0)))
    logs = [next(m.turns(0, batch())).log for m in (plain, guided, other)]
    matching, distillation = ([log[f"student/{name}"].item() for log in logs] for name in ("matching", "distillation"))
    assert matching[0] == matching[2] != matching[1] and distillation[0] == distillation[1] != distillation[2]


def test_times_are_scaled_to_where_the_difference_has_room():
    t = gaussian(config(data="images")).drawn(samples(4000))
    assert t.min() >= 0.01001 and t.max() < 1
    low = gaussian(config(data="images", derivative="exact", times="uniform")).drawn(samples(4000))
    assert low.min() < 0.002 and abs(low.mean() - 0.5) < 0.02
    assert abs(t.mean() - 0.7) < 0.02  # sigmoid of N(1, 1), nearly
    clean = gaussian(config(data="images", times="uniform", time_min=0.3)).drawn(samples())
    torch.testing.assert_close(clean, 0.3 + 0.7 * samples().draws.uniform("t"))


def test_blocks_that_are_run_again_are_derived_in_a_pass_of_their_own():
    """The same numbers, and a gradient all the same."""
    results = []
    for again in (False, True):
        method = gaussian(config(data="images", derivative="exact", gradient_checkpointing=again))
        method.student.network.off.data += 0.1
        (turn,) = method.turns(0, samples())
        results.append(torch.autograd.grad(sum(p for p, _ in turn.backward), method.student.network.off)[0])
    torch.testing.assert_close(*results)


# --- sparse samples ---------------------------------------------------------------------------------------------------


class Sparse(nn.Module):
    """Mixes the voxels of an object, those that are there, so that its answer depends on no others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x: Tensor, timestep: Tensor, present: Tensor) -> Tensor:
        there = present[..., None].to(x)
        mean = (x * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)
        return torch.tanh(self.inner(x + mean)) * (1 + (timestep / 1000)[:, None, None])


class Given:
    """The first entries of the draws of a larger sample."""

    def __init__(self, draws: Draws, size: int) -> None:
        self.draws, self.size = draws, size

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.draws.normal(name, (8, 3))[:, : self.size].double() if shape else self.draws.normal(name, ())


def sparse(objects: list[Tensor], size: int) -> tuple[Batch, MdtDist]:
    """Objects (N, 3) of several N, padded to ``size`` with nonsense."""
    torch.manual_seed(0)
    roles = {n: NetworkRole(n, NetworkDenoiser(Sparse(), ModuleRecipe(), FLOW, "flow")) for n in ("student", "teacher")}
    guided = GuidedDenoiser(roles["teacher"], 1.0, further=0)
    method = MdtDist(config(data="images"), roles, guided, guided, Sampler(FLOW, (1.0,), "ode"))
    x0 = torch.full((len(objects), size, 3), 7.0, dtype=torch.float64)
    mask = torch.zeros(len(objects), size, dtype=torch.bool)
    for row, points in enumerate(objects):
        x0[row, : len(points)], mask[row, : len(points)] = points, True
    told = Conditioning({"present": Leaf(mask, rows=1)}, len(objects))
    draws = Given(Draws(0, 0, range(len(objects))), size)
    return Batch(len(objects), (size, 3), told, draws, Real(x0, told), False), method


def test_padding_changes_nothing_and_every_voxel_weighs_alike():
    objects = [torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (2, 5, 4)]
    results = []
    for size in (5, 8):
        one, method = sparse(objects, size)
        (turn,) = method.turns(0, one)
        loss = sum(piece for piece, _ in turn.backward)
        results.append((loss.detach(), torch.autograd.grad(loss, method.student.network.inner.weight)[0]))
    torch.testing.assert_close(*results)
    a, mask = torch.tensor([[1.0, 9.0], [2.0, 3.0]])[..., None], torch.tensor([[True, False], [True, True]])
    assert mean_over_present("mse", a, torch.zeros_like(a), mask).mean().item() == pytest.approx((1 + 4 + 9) / 3)
    assert mean_over_present("mse", a, torch.zeros_like(a), None).mean().item() == pytest.approx((1 + 81 + 4 + 9) / 4)


def test_the_norm_is_that_of_an_object():
    g, mask = torch.ones(2, 4, 3), torch.tensor([[True] * 4, [True] + [False] * 3])
    one = normalized(of_present(g, mask), "norm/sqrt(dim)", 0.0, present_entries(g, mask))
    torch.testing.assert_close(one, of_present(g, mask))
    torch.testing.assert_close(normalized(of_present(g, mask), "norm", 0.0)[1, 0], torch.full((3,), 3**-0.5))
    with pytest.raises(ValueError, match="has no entries"):
        present_entries(g, torch.zeros(2, 4, dtype=torch.bool))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matching_weight": 0.0}, "--matching_weight must be positive"),
        ({"derivative": "forward"}, "--derivative must be one of exact, central, renoise, backward"),
        ({"derivative_step": 0.5}, "--derivative_step is a time between 0 and 0.5"),
        ({"normalization": "rms"}, "--normalization must be one of"),
        ({"distillation_time_weight": "t"}, "--distillation_time_weight must be one of none, 1-t"),
        ({"distance": "lpips"}, "--distance must be one of"),
        ({"times": "karras"}, "--times must be one of logit_normal, uniform"),
        ({"time_min": 1.5}, "--time_min must be between 0 and 1"),
        ({"sigma_min": -1.0}, r"--sigma_min must be in \[0, 0.5\)"),
        ({"distillation_weight": 0.0, "distillation_guidance": 4.0}, "belongs to velocity distillation"),
        ({"data": "a", "pairs": "b"}, "give --data or --pairs, not both"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(**settings)


def test_a_student_that_starts_below_the_cleanest_time_is_refused():
    with pytest.raises(UserError, match=r"no time lies between --time_min 0\.5 and 0\.4"):
        config(time_min=0.5).span(FLOW, 0.4)
