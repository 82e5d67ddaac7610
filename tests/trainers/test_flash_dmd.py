"""Flash-DMD's own class on small real networks, in the real loop: order, routing, what is judged, and resume."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import Asked, Labels, every_kind_of_teacher, make_loop, roles_that_move

from fewstep.data.batch import Batch
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rollout import draw_sample
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import UserError
from fewstep.trainers.dmd2 import Dmd2, Dmd2Config
from fewstep.training.method import Pull, Turn
from tests.checkpoints import load_latest
from tests.trainers.toy_flash_dmd import GRID, Numbers, config, levels, method


def batch(step: int = 0, size: int = 4) -> Batch:
    indices = list(range(size))
    return Batch(size, (6,), Labels().batch(0, indices), Draws(0, step, indices), Numbers().batch(0, indices), False)


def run(one, **loop):
    make_loop(one, one.config, real=Numbers() if one.judge is not None else None, **loop).run()


# --- the order of things ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("updates", "follows"), [(1, 0.97), (2, 0.97), (2, 1.0)])
def test_the_critic_follows_the_student_and_learns_in_every_step(tmp_path: Path, updates: int, follows: float):
    one = method(config(tmp_path, critic_updates=updates, critic_follows_student=follows))
    pull = ["Pull critic"] if follows < 1 else []
    both = ["Turn student", *pull, "Turn critic", "Turn discriminator"]
    for step in range(4):
        orders = list(one.turns(step, batch(step)))
        assert [f"{type(t).__name__} {t.role}" for t in orders] == (["Turn critic"] if step % updates else both)
        assert all(t.towards == "student" and t.decay == follows for t in orders if isinstance(t, Pull))


def test_the_pulled_critic_is_the_mean_that_was_asked_for(tmp_path: Path):
    one = method(config(tmp_path, max_steps=1, lr=0.1, critic_lr=0.0, adam_weight_decay=0.0))
    before = {name: value.clone() for name, value in one.critic.state_dict().items()}
    run(one)
    student = one.student.state_dict()
    expected = {name: 0.97 * value + 0.03 * student[name] for name, value in before.items()}
    torch.testing.assert_close(one.critic.state_dict(), expected)
    assert all(not torch.equal(student[name], before[name]) for name in before)


# --- who teaches which step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renoise", ["fresh", "ode"])
def test_noisy_steps_are_matched_and_clean_ones_judged(tmp_path: Path, renoise: str):
    """The two gradients never meet in one call, and neither passes through the walk."""
    one = method(config(tmp_path, critic_updates=1), renoise=renoise)
    asked, seen = Asked(one.student), set()
    for step in range(24):
        asked.times.clear()
        turn = next(one.turns(step, batch(step)))
        (x0, gradient), (adversarial, none) = turn.backward
        assert none is None and gradient.shape == x0.shape and not gradient.requires_grad
        noisy, clean = (t.unique().item() for t in asked.times["student", True])
        seen.add((noisy, clean))
        assert len(asked.times["student", False]) == 3  # the other steps of the walk
        assert torch.autograd.grad(adversarial, x0, allow_unused=True, retain_graph=True) == (None,)
    assert seen == {(noisy, clean) for noisy in GRID[:2] for clean in GRID[2:]}


def test_a_turn_reaches_its_own_role_and_nothing_else(tmp_path: Path):
    one = method(config(tmp_path, critic_updates=1))
    parameters = {(n, k): p.requires_grad_() for n, r in one.roles.items() for k, p in r.named_parameters()}
    parameters |= {("teacher", k): p.requires_grad_() for k, p in one.roles["teacher"].weights.named_parameters()}
    reached: dict[str, set[str]] = {}
    for turn in one.turns(0, batch()):
        if isinstance(turn, Turn):
            for tensor, gradient in turn.backward:
                found = torch.autograd.grad(
                    tensor, list(parameters.values()), gradient, allow_unused=True, retain_graph=True
                )
                names = {name for (name, _), g in zip(parameters, found, strict=True) if g is not None}
                reached.setdefault(turn.role, set()).update(names)
    # The judge's heads are between the student and its loss; the loop asks for the gradient of the student alone.
    assert reached == {
        "student": {"student", "discriminator"},
        "critic": {"critic"},
        "discriminator": {"discriminator"},
    }


@pytest.mark.parametrize("renoise", ["fresh", "ode"])
def test_what_is_judged_is_the_end_of_the_walk_noised_afresh(tmp_path: Path, renoise: str):
    one = method(config(tmp_path), renoise=renoise)
    for step in range(6):
        given = batch(step)
        found = one.refined(one.called(given), given)
        again = batch(step)
        end = draw_sample(one.student, one.sampler, again.draws, (6,), again.conditioning).detach()
        place = again.draws.shared_integer("judged_step", 2, 4)
        t = torch.full((4,), GRID[place], dtype=torch.float64)
        x_t = add_noise(end, again.draws.normal("judged_noise", (6,)), one.sampler.schedule.coefficients(t))
        torch.testing.assert_close(found, one.student(x_t, t, again.conditioning), rtol=0, atol=0)


def test_the_judges_gradient_is_that_of_its_formula(tmp_path: Path):
    """-sigmoid(-D) dD/dy / (B n), of n levels, times the weight."""
    one = method(config(tmp_path, gan_weight=0.3))
    given = batch()
    y = one.refined(one.called(given), given).detach().requires_grad_()
    ours = torch.autograd.grad(0.3 * one.judge.student_loss(levels(y)), y)[0]
    heads = one.roles["discriminator"].added["heads"].levels
    expected = torch.zeros_like(y)
    for head, level in zip(heads, levels(y), strict=True):
        logits = head(level)
        expected += torch.autograd.grad(logits, y, -0.3 * torch.sigmoid(-logits) / 8)[0]
    torch.testing.assert_close(ours, expected)


def test_the_judges_loss_counts_by_its_weight(tmp_path: Path):
    turn = next(method(config(tmp_path, gan_weight=0.3)).turns(0, batch()))
    (_, (loss, _)) = turn.backward
    torch.testing.assert_close(loss.detach(), 0.3 * turn.log["student/adversarial"])


# --- beside DMD2 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renoise", ["fresh", "ode"])
def test_with_all_steps_matched_and_no_pull_it_is_dmd2(tmp_path: Path, renoise: str):
    shared = {"max_steps": 7, "batch_size": 4, "log_steps": 1, "report_to": "none", "lr": 1e-2, "critic_updates": 3}
    shared |= {"sample_steps": 0}
    flash = method(
        config(tmp_path / "flash", matched_steps=4, gan_weight=0.0, critic_follows_student=1.0, **shared),
        renoise=renoise,
    )
    beside = method(config(tmp_path / "other", gan_weight=0.0), renoise=renoise)
    dmd2 = Dmd2(
        Dmd2Config(teacher="tiny", out=str(tmp_path / "dmd2"), **shared), beside.roles, beside.teacher, beside.sampler
    )
    run(flash)
    make_loop(dmd2, dmd2.config).run()
    for name in ("student", "critic"):
        torch.testing.assert_close(
            flash.roles[name].state_dict(), dmd2.roles[name].state_dict(), rtol=0, atol=0, msg=name
        )


@every_kind_of_teacher
@pytest.mark.parametrize("renoise", ["fresh", "ode"])
def test_every_kind_of_teacher_trains_all_roles(tmp_path: Path, schedule: NoiseSchedule, kind: str, renoise: str):
    one = method(config(tmp_path, gan_weight=0.0, critic_follows_student=1.0), schedule, kind, renoise)
    assert roles_that_move(one) == {"student", "critic"}
    judged = method(config(tmp_path / "judged", max_steps=1), schedule, kind, renoise)
    before = {name: value.clone() for name, value in judged.roles["discriminator"].state_dict().items()}
    run(judged)
    after = judged.roles["discriminator"].state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path):
    settings = {"max_steps": 7, "ema_decay": 0.9, "lr_warmup_steps": 2, "checkpointing_steps": 1}
    run(method(config(tmp_path / "whole", **settings)))
    first = method(config(tmp_path / "parts", **settings))
    loop = make_loop(first, first.config, real=Numbers())
    first.config.max_steps = 3
    loop.run()
    again = method(config(tmp_path / "parts", **settings))
    loop = make_loop(again, again.config, real=Numbers())
    loop.resume()
    loop.run()
    (_, ours), (_, theirs) = (load_latest(tmp_path / name / "checkpoints") for name in ("parts", "whole"))
    assert {"student", "critic", "discriminator", "ema"} <= ours.keys()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_micro_batches_add_up_to_their_batch(tmp_path: Path):
    states: list[dict[str, Tensor]] = []
    for name, more in {
        "whole": {"batch_size": 4},
        "parts": {"batch_size": 2, "gradient_accumulation_steps": 2},
    }.items():
        one = method(config(tmp_path / name, max_steps=6, **more))
        run(one)
        states.append({f"{n}.{k}": v for n, r in one.roles.items() for k, v in r.state_dict().items()})
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_the_discriminator_learns_to_tell_real_from_fake(tmp_path: Path):
    settings = {"lr": 0.0, "critic_follows_student": 1.0, "critic_updates": 1, "discriminator_lr": 3e-2}
    one = method(config(tmp_path, max_steps=40, batch_size=8, log_steps=40, **settings))
    given = batch()
    seen = [level.detach() for level in levels(one.refined(one.called(given), given))]
    before = one.judge.own_loss(seen, given.real.x0).item()
    run(one)
    assert one.judge.own_loss(seen, given.real.x0).item() < 0.8 * before


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, "give --steps 2 or more"),
        ({"matched_steps": 4}, "leave one of --steps 4 to be judged"),
        ({"matched_steps": 0}, "must be at least 1"),
        ({"gan_weight": 0.0, "matched_steps": 5}, "--matched_steps 5"),
        ({"gan_weight": 0.0, "data": "numbers"}, "leave out --data: it belongs to the GAN"),
        ({"gan_weight": 0.0, "feature_extractor": "sam"}, "leave out --feature_extractor"),
        ({"data": None}, "--gan_weight needs real images: give --data"),
        ({"gan_loss": "wasserstein"}, "must be one of hinge, non_saturating"),
        ({"gan_weight": -1.0}, "gan_weight must not be negative"),
        ({"discriminator_lr": float("nan")}, "discriminator_lr"),
        ({"critic_follows_student": 1.5}, "critic_follows_student must be in"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **settings)


def test_half_of_the_steps_is_matched_by_default(tmp_path: Path):
    assert [config(tmp_path, steps=n).resolved().matched_steps for n in (2, 3, 4, 8)] == [1, 1, 2, 4]
    assert config(tmp_path, steps=1, gan_weight=0.0).resolved().matched_steps == 1
