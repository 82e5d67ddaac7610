"""PeRFlow's own class: its windows' ends in closed form, its lines in every form, its gradient, and what it refuses."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from toys import TABLE, TinyNetwork, labels, role

from fewstep.data.batch import Batch, Pairs
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.ode import OdeSolver
from fewstep.diffusion.prediction import add_noise, expand
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TableSchedule
from fewstep.diffusion.timesteps import even_grid
from fewstep.diffusion.windows import Window, solver_times
from fewstep.errors import UserError
from fewstep.eval.bench.floors import declared
from fewstep.eval.bench.formulas import formula
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.programs.planning.call_counts import Calls
from fewstep.trainers.perflow import Chord, PerFlow, PerFlowConfig
from fewstep.trainers.rectified_flow import RectifiedFlow, RectifiedFlowConfig

SCHEDULES = {"flow": FlowSchedule(), "epsilon": TABLE, "v_prediction": TABLE, "edm": EDMSchedule()}
FORMS = [("flow", "velocity"), ("edm", "velocity"), ("epsilon", "velocity")]
FORMS += [(kind, form) for kind in ("epsilon", "v_prediction") for form in ("ddim_eps", "diff_eps")]
DATA_STD = 0.7


def config(**settings) -> PerFlowConfig:
    return PerFlowConfig(teacher="tiny", out="unused", **{"steps": 4, "report_to": "none", **settings})


class Gaussian:
    """The exact x0 of samples of N(0, s^2), and where its ODE leads."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule, self.further, self.calls = schedule, 0, 1

    def variance(self, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.schedule.coefficients(t)
        return alpha**2 * DATA_STD**2 + sigma**2

    def __call__(self, x_t, t, conditioning, end=None):
        alpha, _ = self.schedule.coefficients(t)
        return expand(alpha * DATA_STD**2 / self.variance(t), x_t) * x_t

    def leads(self, x: torch.Tensor, now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
        """The ODE of a Gaussian keeps x over its standard deviation."""
        return expand((self.variance(then) / self.variance(now)).sqrt(), x) * x


def method(kind: str = "flow", teacher=None, **settings) -> PerFlow:
    """Over vectors of 6 with labels; the teacher a network, unless it is given."""
    schedule = SCHEDULES[kind]
    torch.manual_seed(0)
    roles = {name: role(name, TinyNetwork(6), schedule, kind, name == "student") for name in ("teacher", "student")}
    told = config(**settings)
    guided = teacher or GuidedDenoiser(roles["teacher"], 3.0)
    grid = tuple(schedule.snap(even_grid(told.steps)).tolist())
    return PerFlow(told, roles, guided, Sampler(schedule, grid, "ode", schedule.initial_scale()))


def batch(count: int = 8) -> Batch:
    draws = Draws(0, 0, range(count))
    x0 = Draws(0, 7, range(count)).normal("x0", (6,)).double()
    conditioning = labels([float(i % 3) for i in range(count)], 0.5)
    pairs = Pairs(x0, x0, conditioning)
    return Batch(count, (6,), conditioning, draws, None, False, pairs)


def drawn(trained: PerFlow, count: int = 8) -> Chord:
    samples = batch(count)
    noise = samples.draws.normal("noise", (6,)).double()
    return trained.chord(samples.pairs.x0, noise, trained.times(samples), samples.conditioning)


@pytest.mark.parametrize("kind", ["flow", "epsilon", "edm"])
@pytest.mark.parametrize(("solver", "steps", "off"), [("euler", 200, 2e-2), ("heun", 60, 2e-3)])
def test_the_ends_of_the_windows_are_those_of_a_gaussians_ode(kind: str, solver: str, steps: int, off: float):
    schedule = SCHEDULES[kind]
    exact = Gaussian(schedule)
    trained = method(kind, exact, windows=4, solver=solver, solver_steps=steps, first_window="data")
    chord = drawn(trained, 32)
    assert len(set(chord.window.start.tolist())) == 4
    wanted = exact.leads(chord.x_s, chord.window.start, chord.window.end)
    size = exact.variance(chord.window.start).sqrt()
    assert float(((chord.x_e - wanted) / expand(size, wanted)).abs().max()) < off


@pytest.mark.parametrize("kind", ["flow", "epsilon", "edm"])
def test_one_window_is_rectified_flow_of_the_same_solver(kind: str):
    """From the sampler's noise the window's end is the pair's sample, and the loss is that of the pair's line."""
    trained, schedule = method(kind, windows=1, steps=1, solver_steps=5), SCHEDULES[kind]
    chord = drawn(trained)
    samples = batch()
    noise = samples.draws.normal("noise", (6,)).double()
    start = trained.sampler.initial_scale * noise
    torch.testing.assert_close(chord.x_s, start)
    times = [float(t[0]) for t in solver_times(chord.window, 5, schedule)[:-1]]
    x0 = OdeSolver(trained.teacher, schedule).to_data(start, times, samples.conditioning)
    clean = 0 if kind != "edm" else 0.005  # whose last time is sigma_min
    torch.testing.assert_close(chord.x_e, x0, rtol=0, atol=max(1e-9, clean))
    reflow = RectifiedFlow(
        RectifiedFlowConfig(teacher="tiny", out="unused", loss="l2", report_to="none"), trained.roles, trained.sampler
    )
    on_line = reflow.line_noise(Pairs(x0, noise, samples.conditioning))
    torch.testing.assert_close(trained.target(chord), on_line - x0, rtol=1e-9, atol=max(1e-9, clean))
    torch.testing.assert_close(
        chord.x_t, add_noise(x0, on_line, schedule.coefficients(chord.t)), rtol=0, atol=max(1e-9, clean)
    )
    if kind != "edm":  # next to its clean end the same difference is a large one of velocities
        x0_student = trained.student(chord.x_t, chord.t, samples.conditioning)
        ours = trained.loss(trained.said(x0_student, chord), trained.target(chord), chord.t).mean()
        theirs, _ = reflow.distance(x0, x0_student, schedule.flow_time(chord.t))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_a_student_that_is_right_has_no_loss_and_its_sampler_stops_at_the_windows_ends(kind: str, form: str):
    trained = method(kind, form=form, solver_steps=3)
    samples = batch()
    x = trained.sampler.initial_scale * samples.draws.normal("noise", (6,)).double()
    ends, sayings = [], []
    for start, end in pairwise((*trained.sampler.grid, 0.0)):
        window = Window(*(torch.full((8,), t, dtype=torch.float64) for t in (start, end)))
        times = solver_times(window, trained.config.solver_steps, trained.schedule)
        x_e = trained.walk(x, times[:-1], times[1:], samples.conditioning, x)
        chord = trained.joined(window, window.start, x, x_e)
        sayings.append(x0_of(trained, chord))
        torch.testing.assert_close(trained.said(sayings[-1], chord), trained.target(chord), rtol=1e-7, atol=1e-7)
        assert float(trained.loss(trained.said(sayings[-1], chord), trained.target(chord), chord.t).max()) < 1e-12
        ends.append(x_e)
        x = x_e
    seen: list[torch.Tensor] = []

    def right(x_t, t, conditioning, end=None):
        seen.append(x_t)
        return sayings[len(seen) - 1]

    noise = trained.sampler.initial_scale * batch().draws.normal("noise", (6,)).double()
    last = rollout(right, trained.sampler, noise / trained.sampler.initial_scale, samples.conditioning)
    for x_t, x_e in zip(seen[1:], ends):
        torch.testing.assert_close(x_t, x_e, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(last, ends[-1], rtol=0, atol=1e-2 if kind == "edm" else 1e-9)


def x0_of(trained: PerFlow, chord: Chord) -> torch.Tensor:
    """The x0 that says the target: what is said is a line in it, which two points show."""
    zero, one = (trained.said(torch.full_like(chord.x_t, value), chord) for value in (0.0, 1.0))
    return (trained.target(chord) - zero) / (one - zero)


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_only_the_student_learns_and_the_teacher_is_asked_as_often_as_declared(kind: str, form: str):
    trained = method(kind, form=form, solver_steps=3, solver="heun")
    assert declared(trained, 0, batch()) == {"student": Calls(to_parameters=1), "teacher": Calls(no_grad=12)}
    assert formula(trained, 0.5) == ("3 + 6w", 15.0)
    (turn,) = trained.turns(0, batch())
    ((loss, gradient),) = turn.backward
    assert turn.role == "student" and loss.shape == () and gradient is None
    loss.backward()
    moved = [p.grad for p in trained.student.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in moved)
    assert all(p.grad is None for p in trained.roles["teacher"].denoiser.network.parameters())
    assert not trained.target(drawn(trained)).requires_grad


def test_the_second_noise_is_the_first_times_a_number_of_its_window():
    one, other = (method("epsilon", form=form, solver_steps=2) for form in ("ddim_eps", "diff_eps"))
    chord = drawn(one)
    (_, ours), (_, theirs) = (one.noise_map(form, chord.window) for form in ("ddim_eps", "diff_eps"))
    ratio = expand(ours / theirs, chord.x_t)
    torch.testing.assert_close(other.target(chord), ratio * one.target(chord))
    x0 = torch.ones_like(chord.x_t)
    torch.testing.assert_close(other.said(x0, chord), ratio * one.said(x0, chord))


def test_where_windows_begin():
    samples, t = batch(), torch.tensor([1.0, 0.9, 0.75, 0.3] * 2, dtype=torch.float64)
    noise = samples.draws.normal("noise", (6,)).double()
    for place, pure in (("noise", True), ("data", False)):
        trained = method("epsilon", first_window=place)
        x_s = trained.chord(samples.pairs.x0, noise, t, samples.conditioning).x_s
        assert torch.equal(x_s[:2], noise[:2]) is pure
        alpha, sigma = TABLE.coefficients(torch.tensor([0.5], dtype=torch.float64))
        torch.testing.assert_close(x_s[3], alpha * samples.pairs.x0[3] + sigma * noise[3])


def test_the_first_window_begins_at_the_noise_wherever_the_grid_does():
    plain = method("epsilon", windows=2, steps=2)
    lower = PerFlow(plain.config, plain.roles, plain.teacher, Sampler(TABLE, (0.6, 0.3), "ode", 0.9))
    samples, t = batch(), torch.tensor([0.6, 0.4, 0.3, 0.1] * 2, dtype=torch.float64)
    noise = samples.draws.normal("noise", (6,)).double()
    x_s = lower.chord(samples.pairs.x0, noise, t, samples.conditioning).x_s
    torch.testing.assert_close(x_s[:2], 0.9 * noise[:2])
    alpha, sigma = TABLE.coefficients(torch.tensor([0.3], dtype=torch.float64))
    torch.testing.assert_close(x_s[2:4], alpha * samples.pairs.x0[2:4] + sigma * noise[2:4])


def test_times_and_the_solvers_steps_are_even_before_the_shift():
    """Shifted by 3, t is 3 t / (1 + 2 t)."""
    asked: list[torch.Tensor] = []

    class Noted(Gaussian):
        def __call__(self, x_t, t, conditioning, end=None):
            asked.append(t)
            return super().__call__(x_t, t, conditioning)

    schedule, told = FlowSchedule(), config(windows=2, steps=2, solver_steps=2)
    trained = PerFlow(told, {"student": None}, Noted(schedule), Sampler(schedule, (1.0, 0.75), "ode"), shift=3.0)
    found = trained.at(torch.tensor([0.0, 0.25, 0.5, 0.75]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.9, 0.75, 0.5], dtype=torch.float64))
    assert float(trained.at(torch.tensor([1.0]))) == 1e-3  # a network says nothing of a clean sample
    samples, t = batch(2), torch.tensor([0.8, 0.3], dtype=torch.float64)
    trained.chord(samples.pairs.x0, samples.pairs.x0, t, samples.conditioning)
    expected = torch.tensor([[1.0, 0.75], [0.9, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(asked), expected)


@pytest.mark.parametrize("guidance", ["baked", "kept"])
@pytest.mark.parametrize("times", ["uniform", "grid"])
def test_what_a_run_is_prepared_with(guidance: str, times: str):
    """A guidance that is kept is no part of the teacher's; a student of its grid's times alone is for that count."""
    settings, toy, said = config(guidance=guidance, times=times, windows=2), method(), {}
    grids = {count: tuple(even_grid(count).tolist()) for count in (2, 3, 4)}
    bench = SimpleNamespace(
        make_roles=lambda *_names: toy.roles,
        guided=lambda one, scale=None: GuidedDenoiser(one, 3.0 if scale is None else scale),
        describe=lambda **what: said.update(what),
        sampler=toy.sampler,
        shift=3.0,
        grids=grids,
    )
    made = PerFlow.prepare(settings, bench)
    assert made.teacher.guidance_scale == (1.0 if guidance == "kept" else 3.0) and made.shift == 3.0
    assert said == {
        "counts": (2, 4),
        "grids": {count: grids[count] for count in (2, 4)},
        "trained_at_every_count": times == "uniform",
        "guidable": guidance == "kept",
    }


def test_times_are_those_of_the_grid_or_lie_everywhere():
    assert set(method(times="grid").times(batch(400)).tolist()) == {1.0, 0.75, 0.5, 0.25}
    anywhere = method().times(batch(400))
    assert len(set(anywhere.tolist())) > 390 and float(anywhere.min()) >= 1e-3


@pytest.mark.parametrize("size", [1, 4])
def test_a_samples_loss_is_huber_by_its_own_entries_and_more_at_the_noise(size: int):
    said, t = torch.full((size, 6), 1e-3).double(), torch.linspace(0.05, 0.8, size).double()
    squared, c = 6 * 1e-6, 0.00054 * 6**0.5
    expected = torch.full((size,), (squared + c**2) ** 0.5 - c).double()
    plain, noisy = (method(distance="pseudo_huber_norm", weighting=one) for one in ("uniform", "noisy"))
    torch.testing.assert_close(plain.loss(said, torch.zeros_like(said), t), expected)
    torch.testing.assert_close(noisy.loss(said, torch.zeros_like(said), t), expected / (2.3 * (1 - t)))


def test_kept_guidance_drops_conditions_and_asks_the_teacher_without():
    trained = method(guidance="kept", label_drop=0.5)
    samples = batch(200)
    told = trained.conditioning(samples.conditioning, samples).arguments()["label"]
    dropped = told == 0.5  # the negative's own
    assert 70 < int(dropped.sum()) < 130
    assert torch.equal(told[~dropped], samples.conditioning.arguments()["label"][~dropped])
    baked = method()
    assert baked.conditioning(samples.conditioning, samples) is samples.conditioning


def test_grids_that_pass_a_windows_edge_are_not_walked():
    trained = method(windows=2, steps=4)
    assert trained.windows.edges == (0.0, 0.5, 1.0)
    assert [count for count in range(1, 9) if trained.walks(even_grid(count).tolist())] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"windows": 8}, "--windows 8 need a step each: give --steps 8, or fewer windows"),
        ({"windows": 3}, "--windows 3 do not divide --steps 4"),
        ({"windows": 0}, "--windows must be at least 1"),
        ({"solver_steps": 0}, "--solver_steps must be at least 1"),
        ({"form": "epsilon"}, "--form must be one of velocity, ddim_eps, diff_eps"),
        ({"form": "ddim_eps", "windows": 2}, "--form ddim_eps has one step in each window"),
        ({"solver": "rk45"}, "--solver must be one of euler, heun"),
        ({"guidance": "kept", "guidance_scale": 3.0}, "leave out --guidance_scale"),
        ({"guidance": "off"}, "--guidance must be one of baked, kept"),
        ({"label_drop": 1.0}, r"--label_drop must be in \[0, 1\)"),
        ({"first_window": "x"}, "--first_window must be one of noise, data"),
        ({"times": "late"}, "--times must be one of uniform, grid"),
        ({"distance": "far"}, "--distance must be one of mse"),
        ({"weighting": "snr"}, "--weighting must be one of uniform, noisy"),
        ({"huber_c": -1.0}, "--huber_c must not be negative"),
        ({"renoise": "fresh"}, "--renoise must be ode for windows"),
        ({"data": "fashion", "pairs": "pairs"}, "give --data or --pairs, not both"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings: dict, said: str):
    with pytest.raises(UserError, match=said) as error:
        config(**settings)
    assert "\n" not in str(error.value)


ZERO_SNR = TableSchedule(torch.linspace(0.999, 0.0, 1000, dtype=torch.float64))


@pytest.mark.parametrize(
    ("schedule", "settings", "guided", "said"),
    [
        (FlowSchedule(), {"form": "ddim_eps"}, True, "is of a teacher with a table of noise levels"),
        (EDMSchedule(), {"form": "diff_eps"}, True, "is of a teacher with a table of noise levels"),
        (ZERO_SNR, {"form": "ddim_eps"}, True, "this table leaves none there"),
        (TABLE, {"guidance": "kept"}, False, "needs a teacher with classifier-free guidance"),
        (TABLE, {"solver_steps": 300}, True, "--solver_steps 300 in each of 4 windows are more than the 1000 times"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_one_line(schedule, settings: dict, guided: bool, said: str):
    told = config(**settings)
    with pytest.raises(UserError, match=said) as error:
        told.refuse_teacher(schedule, 1.0, guided)
    assert "\n" not in str(error.value)
    config().refuse_teacher(schedule, 1.0, guided)
