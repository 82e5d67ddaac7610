"""Roles on one backbone against the oracle of separate networks, one for each role, and what must not change."""

import time
from collections.abc import Callable

import pytest
import tiny_pipelines
import torch
from torch import Tensor

from fewstep.config.run import RunConfig
from fewstep.networks.compiled import CompiledForms
from fewstep.networks.roles import make_role
from fewstep.recording import Recording, record
from fewstep.recording.watch.shake import shaken
from fewstep.training.optimization import RoleOptimizer
from tests.networks.shared_backbone import ALPHA, NAMES, RANK, Players, players

# --- the shapes that distillation methods have ------------------------------------------------------------------------

Pairs = list[tuple[Tensor, Tensor | None]]


def dmd(p: Players) -> Pairs:
    """Student forward, then teacher and critic without gradient, then backward at x0."""
    x0 = p.roles["student"](p.x_t, p.t, p.conditioning)
    with torch.no_grad():
        verdicts = [p.roles[name](x0 + p.x_t, p.t / 2, p.conditioning) for name in ("teacher", "critic")]
    return [(x0, verdicts[1] - verdicts[0])]


def gan(p: Players) -> Pairs:
    """As DMD, and the critic's features of the student's sample must look real: early exit, gradient through both."""
    x0 = p.roles["student"](p.x_t, p.t, p.conditioning)
    features = p.roles["critic"].denoiser.features(x0 + p.x_t, p.t / 2, p.conditioning, p.tap)
    loss = p.head(features).square().mean()
    with torch.no_grad():
        verdict = p.roles["teacher"](x0 + p.x_t, p.t / 2, p.conditioning)
    return [(x0, verdict), (loss, None)]


def sid(p: Players) -> Pairs:
    """Student, critic and teacher in one graph."""
    x0 = p.roles["student"](p.x_t, p.t, p.conditioning)
    teacher = p.roles["teacher"](x0 + p.x_t, p.t / 2, p.conditioning)
    critic = p.roles["critic"](x0 + p.x_t, p.t / 2, p.conditioning)
    return [(((teacher - critic) * (critic - x0)).mean() + (teacher - x0).square().mean(), None)]


def critic_turn(p: Players) -> Pairs:
    """The critic on a sample of the student's; the student is called again before the backward pass."""
    with torch.no_grad():
        x0 = p.roles["student"](p.x_t, p.t, p.conditioning)
    loss = (p.roles["critic"](x0 + p.x_t, p.t / 2, p.conditioning) - x0).square().mean()
    with torch.no_grad():
        p.roles["student"](p.x_t, p.t, p.conditioning)
    return [(loss, None)]


SHAPES = {"dmd": (dmd, "student"), "gan": (gan, "student"), "sid": (sid, "student"), "critic": (critic_turn, "critic")}


def gradients(p: Players, shape: Callable[[Players], Pairs], name: str) -> dict[str, Tensor | None]:
    """As the loop takes them: of one role's parameters, the others' stay None."""
    pairs = shape(p)
    role = p.roles[name]
    torch.autograd.backward([a for a, _ in pairs], [g for _, g in pairs], inputs=role.parameters())
    for other in p.roles.values():
        assert other is role or all(parameter.grad is None for parameter in other.parameters())
    return {key: parameter.grad for key, parameter in role.named_parameters()}


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.soak), True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_separate_networks(recording: Recording, shape: str, checkpointing: bool):
    expected = gradients(players(recording, separate=True), *SHAPES[shape])
    shared = players(recording, separate=False, gradient_checkpointing=checkpointing)
    found = gradients(shared, *SHAPES[shape])
    assert found.keys() == expected.keys()
    got = [key for key, gradient in expected.items() if gradient is not None]
    assert len(got) > len(expected) / 2 and max(float(expected[key].abs().max()) for key in got) > 1e-6
    for key, gradient in expected.items():
        assert (gradient is None) == (found[key] is None)
        assert gradient is None or torch.equal(gradient, found[key]), key


def test_a_plain_checkpoint_gives_wrong_gradients_so_the_test_above_can_fail(recording: Recording):
    expected = gradients(players(recording, separate=True), *SHAPES["sid"])
    shared = players(recording, separate=False)
    shared.roles["student"].backbone.network.enable_gradient_checkpointing()
    try:
        found = gradients(shared, *SHAPES["sid"])
    except torch.utils.checkpoint.CheckpointError:
        return
    assert any(not torch.equal(expected[key], found[key]) for key in expected if expected[key] is not None)


def test_an_adapters_gradient_is_that_of_its_product_in_a_network_of_plain_weights(recording: Recording):
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with W from an ordinary network that holds the merged weights."""
    p = players(recording, separate=False)
    student, scale = p.roles["student"], ALPHA / RANK
    plain = student.backbone.merged(student.weights)
    full = make_role("student", recording, trainable=True, dtype=torch.float64)
    for path in student.backbone.targets:  # the merge in float64, where the stock network is float32
        a, b = (student.weights.get_submodule(f"{path}.{n}").weight for n in ("lora_A", "lora_B"))
        merged = full.denoiser.network.get_submodule(path).weight
        merged.data += scale * (b @ a).detach()
        torch.testing.assert_close(plain.get_submodule(path).weight.double(), merged.detach(), rtol=1e-5, atol=1e-6)
    x0 = full(p.x_t, p.t, p.conditioning)
    torch.testing.assert_close(student(p.x_t, p.t, p.conditioning), x0, rtol=1e-9, atol=1e-9)
    x0.square().mean().backward()
    student(p.x_t, p.t, p.conditioning).square().mean().backward()
    for path in student.backbone.targets:
        gradient = full.denoiser.network.get_submodule(path).weight.grad
        a, b = (student.weights.get_submodule(f"{path}.{n}").weight for n in ("lora_A", "lora_B"))
        if gradient is None:
            assert a.grad is None
            continue
        torch.testing.assert_close(b.grad, scale * gradient @ a.T, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(a.grad, scale * b.T @ gradient, rtol=1e-7, atol=1e-10)


# --- what does not change ---------------------------------------------------------------------------------------------


def test_the_teacher_is_the_base_bit_for_bit_and_the_recorded_network_stays_as_it_was(recording: Recording):
    before = {name: (p, p.requires_grad) for name, p in recording.network.named_parameters()}
    p = players(recording, separate=False, dtype=torch.float32)
    full = make_role("teacher", recording, trainable=False)
    teacher, student = (p.roles[name](p.x_t, p.t, p.conditioning) for name in ("teacher", "student"))
    assert torch.equal(teacher, full(p.x_t, p.t, p.conditioning))
    assert not torch.equal(teacher, student)
    assert {name: (p, p.requires_grad) for name, p in recording.network.named_parameters()} == before
    assert p.roles["teacher"].parameters() == [] and p.roles["teacher"].state_dict() == {}


def test_the_base_is_held_once(recording: Recording):
    network = players(recording, separate=False, dtype=torch.float32).roles["student"].denoiser.network
    recorded = {parameter.data_ptr() for parameter in recording.network.parameters()}
    frozen = [parameter for name, parameter in network.named_parameters() if "lora_" not in name]
    assert {parameter.data_ptr() for parameter in frozen} == recorded
    assert not any(parameter.requires_grad for parameter in frozen)


def test_a_students_update_leaves_critic_and_base_as_they_were(recording: Recording):
    p = players(recording, separate=False, dtype=torch.float32)
    student = p.roles["student"]
    before = {key: value.clone() for key, value in student.denoiser.network.state_dict().items()}
    optimizer = RoleOptimizer(student, RunConfig(teacher="t", out="o"), lr=1e-2)
    gradients(p, gan, "student")
    optimizer.update(0)
    moved = {key for key, value in student.denoiser.network.state_dict().items() if not torch.equal(value, before[key])}
    assert moved and all(".student." in key for key in moved)


def test_a_role_is_entered_without_a_flag_of_gradients_and_left_again(recording: Recording):
    p = players(recording, separate=False, gradient_checkpointing=True)
    network, backbone = p.roles["student"].denoiser.network, p.roles["student"].backbone
    flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    assert {name for name, on in flags.items() if on} == {name for name in flags if "lora_" in name}
    network.register_forward_hook(lambda *_: seen.append({n: q.requires_grad for n, q in network.named_parameters()}))
    seen: list[dict[str, bool]] = []
    for shape, name in SHAPES.values():
        gradients(p, shape, name)
        for role in p.roles.values():
            for parameter in role.parameters():
                parameter.grad = None
    assert seen and all(one == flags for one in seen)
    with pytest.raises(ZeroDivisionError), backbone.active("student"), backbone.active("critic"):
        raise ZeroDivisionError
    x0 = recording.recipe.call(network, p.x_t, recording.schedule.timestep(p.t), p.conditioning)
    with backbone.active(None):
        assert torch.equal(x0, recording.recipe.call(network, p.x_t, recording.schedule.timestep(p.t), p.conditioning))


def test_entering_a_role_is_ten_times_faster_than_pefts_switch():
    from peft.tuners.lora import LoraLayer

    recorded = record(tiny_pipelines.tiny_stable_diffusion())
    backbone = players(recorded, separate=False, dtype=torch.float32).roles["student"].backbone
    layers = [module for module in backbone.network.modules() if isinstance(module, LoraLayer)]

    def theirs() -> None:
        for name in ("student", "critic"):
            for layer in layers:
                layer.set_adapter(name)

    def ours() -> None:
        for name in ("student", "critic"):
            with backbone.active(name):
                pass

    assert fastest(theirs) > 10 * fastest(ours) / 2  # ours also goes back, so each entry is two switches


def fastest(action: Callable[[], None]) -> float:
    durations = []
    for _ in range(50):
        began = time.perf_counter()
        action()
        durations.append(time.perf_counter() - began)
    return min(durations)


@pytest.mark.soak
def test_compiled_there_is_one_graph_for_a_role_and_none_after():
    import torch._dynamo

    graphs = []

    def count(module: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        graphs.append(module)
        return module.forward

    recorded = record(tiny_pipelines.tiny_flow())
    with shaken(recorded.network):
        p = players(recorded, separate=False, dtype=torch.float32)
        eager = {name: p.roles[name](p.x_t, p.t, p.conditioning) for name in NAMES}
        torch._dynamo.reset()
        for name in NAMES:
            p.roles[name].denoiser.form = CompiledForms(name, count)
        with torch.no_grad():
            for name in (*NAMES, *NAMES, "critic", "student", "teacher"):
                assert torch.equal(p.roles[name](p.x_t, p.t, p.conditioning), eager[name])
    assert len(graphs) == len(NAMES)


@pytest.mark.soak  # a minute of compiling; the test above compiles roles, and others checkpoint them
def test_compiled_and_checkpointed_the_gradients_are_the_same():
    """Also where features are tapped inside a checkpointed block, and without a new graph after the first round."""
    import torch._dynamo
    from torch._dynamo.backends.debugging import aot_eager

    graphs = []

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(module)
        return aot_eager(module, inputs)

    recorded = record(tiny_pipelines.tiny_flow())
    with shaken(recorded.network):
        shapes = ("sid", "gan")
        expected = {
            shape: gradients(players(recorded, separate=True, dtype=torch.float32), *SHAPES[shape]) for shape in shapes
        }
        p = players(recorded, separate=False, dtype=torch.float32, gradient_checkpointing=True)
        assert p.tap.module == "transformer_blocks.0"
        torch._dynamo.reset()
        for name in NAMES:
            p.roles[name].denoiser.form = CompiledForms(name, count)
        for _ in range(2):
            for shape in shapes:
                found = gradients(p, *SHAPES[shape])
                torch.testing.assert_close(found, expected[shape], rtol=1e-5, atol=1e-6)
                for parameter in p.roles["student"].parameters():
                    parameter.grad = None
            # Student, critic and teacher of SiD, and the teacher without gradient; what is tapped is not compiled.
            assert len(graphs) == 4
