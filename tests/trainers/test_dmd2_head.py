"""DMD2's GAN head on the frozen teacher's features, and the critic's error in x0."""

from pathlib import Path

import pytest
import torch
from toys import Labels, make_loop, unconditional

from fewstep.errors import UserError
from fewstep.networks.head_role import HeadRole
from fewstep.networks.heads import make_head
from fewstep.trainers.dmd2 import Dmd2
from tests.trainers.test_dmd2 import Pictures, batch, config, gan_method, vector_method

GAN = {"gan_weight": 0.1, "data": "pictures", "critic_updates": 2}


def head_method(out: Path, **settings) -> Dmd2:
    """DMD2 over stock UNets with the head on the teacher's features."""
    plain = gan_method(config(out, **GAN))
    roles = {name: plain.roles[name] for name in ("teacher", "student", "critic")}
    head = roles["critic"].added.pop("head")
    roles["discriminator"] = HeadRole("discriminator", roles["teacher"])
    roles["discriminator"].add("head", head)
    settings = config(out, **GAN, gan_features="teacher", **settings)
    return Dmd2(settings, roles, plain.teacher, plain.sampler, plain.tap)


def test_the_head_has_a_turn_of_its_own_and_the_critic_none_of_its_gradient(tmp_path: Path):
    method = head_method(tmp_path, max_steps=2)
    loop = make_loop(method, method.config, (1, 8, 8), conditions=Labels(None), real=Pictures())
    seen = []
    for name, optimizer in loop.optimizers.items():

        def watched(step, averages, name=name, update=optimizer.update):
            modules = {(owner, part): m for owner, one in method.roles.items() for part, m in one.modules.items()}
            touched = {key for key, m in modules.items() if any(p.grad is not None for p in m.parameters())}
            seen.append((name, touched))
            return update(step, averages)

        optimizer.update = watched
    loop.run()
    parts = {"student": "network", "critic": "network", "discriminator": "head"}
    turns = [(name, {(name, part)}) for name, part in parts.items()]
    assert seen == [*turns, *turns[1:]]


def test_the_head_pulls_at_the_student_through_the_teacher(tmp_path: Path):
    gradients = {}
    for weight in (1e-9, 10.0):
        method = head_method(tmp_path)
        method.config.gan_weight = weight
        loop = make_loop(method, method.config, (1, 8, 8), conditions=Labels(None), real=Pictures())
        turn = next(method.turns(0, next(iter(loop._batches(0)))))
        of = method.roles["student"].parameters()
        tensors = [tensor for tensor, _ in turn.backward]
        given = [torch.ones_like(t) if g is None else g for t, g in turn.backward]
        torch.autograd.backward(tensors, given, inputs=of)
        gradients[weight] = torch.cat([p.grad.flatten() for p in of if p.grad is not None])
    assert not torch.allclose(gradients[1e-9], gradients[10.0], rtol=0.1)


def test_the_head_of_a_bench_sits_on_the_teachers_features(tmp_path: Path):
    method = head_method(tmp_path)
    half = torch.full((1,), 0.5, dtype=torch.float64)
    teacher = method.roles["teacher"].denoiser
    features = teacher.features(torch.zeros(1, 1, 8, 8), half, unconditional(1), method.tap)
    assert make_head(features, 0).logit.in_features == features.shape[1]
    assert method.judge.denoiser.network is teacher.network


def test_the_critics_error_in_x0_has_no_weight_of_time(tmp_path: Path):
    """A flow's velocity error is its x0 error over t^2: with both at one time the losses are apart by that."""
    losses = {}
    for space in ("native", "x0"):
        method = vector_method(config(tmp_path, critic_loss=space))
        method.learnt = method.learnt.__class__(method.sampler.schedule, 0.5, 0.5000001)
        x0 = torch.linspace(-1, 1, 24).reshape(4, 6)
        losses[space] = method.denoising(x0, batch(0, range(4)))[0].item()
    assert losses["native"] == pytest.approx(4 * losses["x0"], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gan_features": "student"}, "gan_features"),
        ({"gan_features": "teacher"}, "--gan_features belongs to the GAN"),
        ({"critic_loss": "eps"}, "critic_loss"),
        ({"critic_loss": "x0", "swiftbrush": True}, "--swiftbrush knows no"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **settings)
