"""Roles on one backbone against the oracle of separate networks, one for each role, and what must not change."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from torch import Tensor, nn
from toys import adapter_role, make_loop

from fewstep.config.run import RunConfig
from fewstep.data.batch import Real
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import Sampler
from fewstep.errors import UserError
from fewstep.networks.adapters import AdapterRole, Backbone, attention_linears
from fewstep.networks.features import FeatureTap, find_tap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.heads import make_head
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.networks.roles import NetworkRole, make_role, update_average
from fewstep.recording import Recording, record
from fewstep.recording.shake import shaken
from fewstep.trainers.dmd2 import Dmd2, Dmd2Config
from fewstep.training.optimization import RoleOptimizer

RANK, ALPHA = 3, 5
NAMES = ("teacher", "student", "critic")
FAMILIES = {"unet": tiny_pipelines.tiny_stable_diffusion, "sd3": tiny_pipelines.tiny_flow}


@pytest.fixture(scope="module", params=FAMILIES)
def recording(request: pytest.FixtureRequest) -> Iterator[Recording]:
    recorded = record(FAMILIES[request.param]())
    with shaken(recorded.network):
        yield recorded


@dataclass
class Players:
    roles: dict[str, AdapterRole]
    head: nn.Module
    tap: FeatureTap
    x_t: Tensor
    t: Tensor
    conditioning: object


def players(recording: Recording, *, separate: bool, dtype=torch.float64, **options) -> Players:
    """Teacher, student and critic on one backbone, or each on a network of its own."""
    shared = Backbone(recording.network, RANK, ALPHA, dtype=dtype, **options)
    roles = {}
    for name in NAMES:
        own = Backbone(recording.network, RANK, ALPHA, dtype=dtype, **options) if separate else shared
        roles[name] = adapter_role(name, own, recording)
    x_t = Draws(0, 0, range(2)).normal("x", recording.sample_shape).to(dtype)
    t = torch.full((2,), 0.5, dtype=torch.float64)
    conditioning = recording.condition(prompts=["a", "b"])
    critic = roles["critic"].denoiser
    tap = find_tap(critic.network, lambda x: critic.raw(x, t, conditioning), x_t)
    with torch.no_grad():
        head = make_head(critic.features(x_t, t, conditioning, tap), seed=0).to(dtype)
    return Players(roles, head, tap, x_t, t, conditioning)


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


@pytest.mark.parametrize("checkpointing", [False, True])
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
        p.roles["student"].denoiser.network.compile(backend=count)
        with torch.no_grad():
            for name in (*NAMES, *NAMES, "critic", "student", "teacher"):
                assert torch.equal(p.roles[name](p.x_t, p.t, p.conditioning), eager[name])
    assert len(graphs) == len(NAMES)


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
        p.roles["student"].denoiser.network.compile(backend=count)
        for _ in range(2):
            for shape in shapes:
                found = gradients(p, *SHAPES[shape])
                torch.testing.assert_close(found, expected[shape], rtol=1e-5, atol=1e-6)
                for parameter in p.roles["student"].parameters():
                    parameter.grad = None
            # Student, critic and teacher of SiD, and the teacher without gradient; what is tapped is not compiled.
            assert len(graphs) == 4


# --- whole runs -------------------------------------------------------------------------------------------------------


class Prompts:
    """A run's conditions: one of two prompts for each sample."""

    def __init__(self, recording: Recording) -> None:
        self.each = recording.condition(prompts=["a", "b"])

    def batch(self, seed: int, positions: list[int]):
        return self.each.select([position % 2 for position in positions])


class Noises:
    """A run's real samples."""

    def __init__(self, recording: Recording) -> None:
        self.shape, self.prompts = recording.sample_shape, Prompts(recording)

    def batch(self, seed: int, positions: list[int]) -> Real:
        x0 = Draws(seed, 0, positions).normal("real", self.shape)
        return Real(x0, self.prompts.batch(seed, positions))


def run_dmd2(recording: Recording, out: Path, *, separate: bool, dtype: torch.dtype, checkpointing: bool) -> dict:
    """Three steps of DMD2 with a GAN, an average and two micro-batches. Returns every role's state."""
    options = {"dtype": dtype, "gradient_checkpointing": checkpointing}
    shared = Backbone(recording.network, RANK, ALPHA, **options)
    roles = {}
    for name in (*NAMES, "ema"):
        own = Backbone(recording.network, RANK, ALPHA, **options) if separate else shared
        roles[name] = adapter_role(name, own, recording, trainable=name in ("student", "critic"))
        roles[name].denoiser.autocast = None if dtype == torch.float32 else dtype
    update_average(roles["ema"], roles["student"], 0)
    config = Dmd2Config(
        teacher="tiny",
        out=str(out),
        max_steps=3,
        batch_size=2,
        gradient_accumulation_steps=2,
        critic_updates=2,
        gan_weight=0.1,
        data="noises",
        ema_decay=0.5,
        lr=1e-2,
        report_to="none",
    )
    t, conditioning = torch.full((2,), 0.5, dtype=torch.float64), recording.condition(prompts=["a", "b"])
    x, critic = torch.zeros(2, *recording.sample_shape), roles["critic"].denoiser
    tap = find_tap(critic.network, lambda x: critic.raw(x, t, conditioning), x)
    with torch.no_grad():
        roles["critic"].add("head", make_head(critic.features(x, t, conditioning, tap), seed=0))
    teacher = GuidedDenoiser(roles["teacher"], recording.negative(), 2.0)
    sampler = Sampler(recording.schedule, (1.0, 0.5), "fresh", recording.schedule.initial_scale())
    method = Dmd2(config, roles, teacher, sampler, tap)
    conditions, real = Prompts(recording), Noises(recording)
    make_loop(method, config, recording.sample_shape, conditions=conditions, real=real).run()
    return {name: role.state_dict() for name, role in roles.items()}


@pytest.mark.parametrize(
    ("dtype", "checkpointing"), [(torch.float32, False), (torch.bfloat16, True)], ids=["float32", "bf16, checkpointed"]
)
def test_a_run_on_one_backbone_is_the_run_on_separate_networks(
    recording: Recording, tmp_path: Path, dtype: torch.dtype, checkpointing: bool
):
    """Bit for bit: accumulation, average, GAN, bfloat16 base under autocast, checkpointing."""
    options = {"dtype": dtype, "checkpointing": checkpointing}
    expected = run_dmd2(recording, tmp_path / "separate", separate=True, **options)
    found = run_dmd2(recording, tmp_path / "shared", separate=False, **options)
    assert found["student"].keys() == found["ema"].keys()
    assert not torch.equal(*(next(iter(found[name].values())) for name in ("student", "ema")))
    for name in ("student", "critic", "ema"):
        assert found[name].keys() == expected[name].keys()
        for key, value in expected[name].items():
            assert torch.equal(found[name][key], value), f"{name}.{key}"


# --- dtypes, states, sizes --------------------------------------------------------------------------------------------


def test_a_bfloat16_base_trains_float32_adapters(recording: Recording):
    p = players(recording, separate=False, dtype=torch.bfloat16)
    student = p.roles["student"]
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    frozen = {q.dtype for name, q in student.denoiser.network.named_parameters() if "lora_" not in name}
    assert frozen == {torch.bfloat16} and next(recording.network.parameters()).dtype == torch.float32
    x_t = p.x_t.float()
    for autocast in (None, torch.bfloat16):
        student.denoiser.autocast = autocast
        x0 = student(x_t, p.t, p.conditioning)
        assert x0.dtype == torch.float32
        found = torch.autograd.grad(x0.square().mean(), student.parameters(), allow_unused=True)
        assert {gradient.dtype for gradient in found if gradient is not None} == {torch.float32}


def test_a_state_holds_the_adapter_and_added_modules_alone_and_fits_only_its_like(recording: Recording):
    critic = players(recording, separate=False).roles["critic"]
    critic.add("head", nn.Linear(2, 1))
    state = critic.state_dict()
    parts = {name.partition(".")[0] for name in state}
    assert parts == {"adapter", "head"}
    assert len(state) == 2 * len(critic.backbone.targets) + 2 == len(critic.parameters())
    other = adapter_role("critic", Backbone(recording.network, RANK, ALPHA), recording)
    other.add("head", nn.Linear(2, 1))
    other.load_state_dict(state)
    torch.testing.assert_close(other.state_dict(), {k: v.float() for k, v in state.items()}, rtol=1e-6, atol=1e-7)
    smaller = adapter_role("critic", Backbone(recording.network, RANK - 1, ALPHA), recording)
    with pytest.raises(ValueError, match=r"critic\.adapter do not fit"):
        smaller.load_state_dict(state)


def test_roles_take_over_each_others_adapters_and_full_copies_the_merged_weights(recording: Recording):
    p = players(recording, separate=False, dtype=torch.float32)
    student, critic, teacher = (p.roles[name] for name in ("student", "critic", "teacher"))
    full = make_role("critic", recording, trainable=True)
    full.copy_weights(student)
    arguments = p.x_t, p.t, p.conditioning
    torch.testing.assert_close(full(*arguments), student(*arguments), rtol=1e-4, atol=1e-4)
    critic.copy_weights(student)
    assert torch.equal(critic(*arguments), student(*arguments))
    critic.copy_weights(teacher)
    assert torch.equal(critic(*arguments), teacher(*arguments))
    with pytest.raises(ValueError, match="cannot become"):
        critic.copy_weights(full)


def test_the_average_is_an_adapter_that_moves_by_its_decay(recording: Recording):
    p = players(recording, separate=False)
    student = p.roles["student"]
    average = adapter_role("ema", student.backbone, recording, trainable=False)
    before = {key: value.clone() for key, value in average.state_dict().items()}
    update_average(average, student, 0.75)
    for key, value in average.state_dict().items():
        torch.testing.assert_close(value, 0.75 * before[key] + 0.25 * student.state_dict()[key])
    adapter_role("target", student.backbone, recording)  # PEFT would ask gradients of all adapters again
    assert average.parameters() == [] and len(student.parameters()) == len(before)


def test_a_rank_larger_than_a_layer_is_one_line_that_names_it(recording: Recording):
    text = r"--lora_rank 64 is larger than a layer of \w+: .* take at most \d+$"
    with pytest.raises(UserError, match=text) as caught:
        Backbone(recording.network, 64, 64)
    assert "\n" not in str(caught.value)
    Backbone(recording.network, int(str(caught.value).rpartition(" ")[2]), 1)


def test_a_network_without_attention_is_refused():
    with pytest.raises(UserError, match="Sequential has no attention layer to adapt; leave out --lora_rank"):
        Backbone(nn.Sequential(nn.Linear(2, 2)), 1, 1)


def test_a_network_that_cannot_checkpoint_is_refused(recording: Recording, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(recording.network), "_supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="has no gradient checkpointing"):
        Backbone(recording.network, 1, 1, gradient_checkpointing=True)


def test_every_linear_layer_below_an_attention_module_is_adapted(recording: Recording):
    names = {name.rpartition(".")[2] for name in attention_linears(recording.network)}
    assert {"to_q", "to_k", "to_v"} <= names


def test_every_role_starts_as_the_teacher_and_two_are_two(recording: Recording):
    settings = RoleSettings(lora_rank=2, ema=True)
    roles = make_roles(settings, recording, ("student", "critic"), torch.device("cpu"))
    p = players(recording, separate=False, dtype=torch.float32)
    outputs = {name: role(p.x_t, p.t, p.conditioning) for name, role in roles.items()}
    assert all(torch.equal(output, outputs["teacher"]) for output in outputs.values())
    assert torch.equal(*(next(iter(roles[name].state_dict().values())) for name in ("student", "ema")))
    assert len({id(role.denoiser.network) for role in roles.values()}) == 1
    settings = replace(settings, full_critic=True)
    roles = make_roles(settings, recording, ("student", "critic"), torch.device("cpu"))
    assert type(roles["critic"]) is NetworkRole
    assert len(roles["critic"].parameters()) == len(list(recording.network.parameters()))
    assert roles["critic"].denoiser.active is nullcontext


def test_a_base_in_bfloat16_has_adapters_gradients_and_optimizer_in_float32(tmp_path: Path) -> None:
    recorded = record(tiny_pipelines.tiny_stable_diffusion())
    config = RunConfig(teacher="t", out=str(tmp_path), lora_rank=2, mixed_precision="bf16", lr=1e-3)
    roles = make_roles(RoleSettings.of(config), recorded, ("student",), torch.device("cpu"))
    student = roles["student"]
    base = [p for name, p in student.backbone.network.named_parameters() if "lora_" not in name]
    assert {p.dtype for p in base} == {torch.bfloat16} and not any(p.requires_grad for p in base)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    optimizer = RoleOptimizer(student, config, 1e-3)
    before = [p.detach().clone() for p in student.parameters()]
    x, t = torch.randn(2, *recorded.sample_shape), torch.tensor([0.4, 0.9], dtype=torch.float64)
    x0 = student(x, t, recorded.condition(["a", "b"]))
    assert x0.dtype == torch.float32
    x0.square().mean().backward(inputs=optimizer.parameters)
    assert {p.grad.dtype for p in optimizer.parameters} == {torch.float32}
    optimizer.update(0)
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    floating = [v for v in optimizer.state().values() if v.is_floating_point()]
    assert floating and {v.dtype for v in floating} == {torch.float32}
