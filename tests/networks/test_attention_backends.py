"""Attention backends: told to a run's own networks alone, tried forward and backward, and said as what really ran.

xformers is a stand-in here, beneath diffusers' own way of calling it: its binaries need a GPU.
"""

import copy
import sys
from collections import Counter
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny_pipelines
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor, nn

from fewstep.cli import main
from fewstep.conditioning.conditioning import Conditioning
from fewstep.config.attention import known_backends
from fewstep.config.checks import names_of
from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.networks.attention import describe_processors, switch_attention
from fewstep.networks.attention_trial import use_attention_backend
from fewstep.networks.derivative import derivative_along
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.programs.distillation import prepare
from fewstep.programs.methods import method_class
from fewstep.programs.workbench import open_workbench
from fewstep.recording import record
from fewstep.recording.watch.shake import shaken
from tests.networks.shared_backbone import NAMES, players

#: Processors that know no backend (UNet, SD3), and some that do (Wan, two networks).
FAMILIES = {
    "unet": tiny_pipelines.tiny_stable_diffusion,
    "sd3": tiny_pipelines.tiny_flow,
    "wan": tiny_pipelines.tiny_wan,
}
CALLS = {"wan": {"height": 16, "width": 16, "num_frames": 5}}


@pytest.fixture(scope="module", params=FAMILIES)
def recording(request: pytest.FixtureRequest):
    recorded = record(FAMILIES[request.param](), **CALLS.get(request.param, {}))
    with shaken(*(expert.network for expert in recorded.experts)):
        yield recorded


@pytest.fixture(scope="module")
def unet():
    recorded = record(tiny_pipelines.tiny_stable_diffusion())
    with shaken(recorded.network):
        yield recorded


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _dropout: float, scale: float | None) -> Tensor:
    """What xformers' memory_efficient_attention(q, k, v, mask, dropout, scale) computes, of (B, N, heads, D)."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        return formula(q, k, v, None, 0.0, None)

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("no operator for the backward pass")


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter]:
    """Installs a stand-in, whose calls are counted."""

    def install(attend: Callable[..., Tensor] = formula) -> Counter:
        calls: Counter[str] = Counter()

        def memory_efficient_attention(*args: object) -> Tensor:
            calls["attention"] += 1
            return attend(*args)

        module = ModuleType("xformers")
        module.__spec__ = ModuleSpec("xformers", None)
        monkeypatch.setitem(sys.modules, "xformers", module)
        ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
        monkeypatch.setattr(attention_dispatch, "xops", ops)
        monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
        return calls

    return install


def roles_of(recording, *names: str, **settings):
    return make_roles(RoleSettings(**settings), recording, names or ("student",), torch.device("cpu"))


def inputs(recording) -> tuple[Tensor, Tensor, Conditioning]:
    x = torch.randn(2, *recording.sample_shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), 0.5, dtype=torch.float64)
    return x, t, Conditioning(recording.marked, 1).select([0, 0])


def tried(roles, recording, backend: str = "xformers") -> str:
    x, t, conditioning = inputs(recording)
    return use_attention_backend(roles, backend, x, t, [conditioning])


def processors(network: nn.Module) -> list[object]:
    return [module.processor for module in network.modules() if hasattr(module, "processor")]


def networks_of(roles) -> list[nn.Module]:
    return [expert.denoiser.network for role in roles.values() for expert in role.experts.values()]


# What runs.


def test_every_family_takes_it_and_the_line_says_how_often(recording, xformers) -> None:
    calls = xformers()
    roles = roles_of(recording)
    line = tried(roles, recording)
    count = calls["attention"]
    kind = type(recording.network).__name__
    assert count and line.startswith(f"attention of {kind}: xformers in {count} of {count} attention calls"), line
    assert "Softmax" in line, "the stand-in's own backward pass is what the graph holds"


def test_no_other_model_changes(recording, xformers) -> None:
    """Neither the teacher's pipeline, whose network the roles are copies of, nor what the process takes by default."""
    xformers()
    before = {id(p): copy.copy(vars(p)) for p in processors(recording.network)}
    default = _AttentionBackendRegistry.get_active_backend()
    functions = dict(_AttentionBackendRegistry._backends)
    roles = roles_of(recording, lora_rank=2)
    assert "xformers in" in tried(roles, recording)
    assert {id(p): vars(p) for p in processors(recording.network)} == before
    assert _AttentionBackendRegistry.get_active_backend() == default
    assert _AttentionBackendRegistry._backends == functions, "what watched the calls is gone"


def test_processors_keep_their_class_and_their_arguments(recording) -> None:
    network = copy.deepcopy(recording.network)
    before = [(type(p), type(p).__call__) for p in processors(network)]
    switch_attention([network], "_native_math")
    assert all(isinstance(p, kind) for p, (kind, _) in zip(processors(network), before, strict=True))
    assert all(type(p).__call__.__code__.co_argcount >= 1 for p in processors(network))
    assert copy.deepcopy(network) is not network


def test_one_switch_takes_the_place_of_another(unet) -> None:
    roles = roles_of(unet)
    assert "_native_math in 16 of 16" in tried(roles, unet, "_native_math")
    assert "_native_flash in 16 of 16" in tried(roles, unet, "_native_flash")
    assert "native in 16 of 16" in tried(roles, unet, "native")
    assert [type(p) for p in processors(networks_of(roles)[0])] == [type(p) for p in processors(unet.network)]


def test_auto_tries_nothing(unet, xformers) -> None:
    calls = xformers()
    roles = roles_of(unet)
    kept = processors(networks_of(roles)[0])
    assert tried(roles, unet, "auto") == ""
    assert not calls and processors(networks_of(roles)[0]) == kept


# What cannot run.


def test_what_is_not_installed_is_one_line_and_nothing_changes(unet, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    roles = roles_of(unet, "student", "critic")
    kept = [processors(network) for network in networks_of(roles)]
    line = tried(roles, unet)
    why = 'xformers is not installed: pip install "fewstep[xformers]"'
    assert line.startswith(f"--attention_backend xformers cannot be used by UNet2DConditionModel: {why}; ")
    assert "native in 16 of 16 attention calls" in line and line.endswith("instead") and "\n" not in line
    assert [processors(network) for network in networks_of(roles)] == kept


def refusing(*_args: object) -> Tensor:
    raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n  query: ...")


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (refusing, "No operator found for `memory_efficient_attention_forward` with inputs: query"),
        (lambda q, k, v, *_: NoBackward.apply(q, k, v), "no operator for the backward pass"),
        (lambda q, k, v, *rest: formula(q, k, v, *rest).detach(), "it has no backward pass"),
        (lambda q, k, v, *rest: formula(q.detach(), k.detach(), v, *rest), "it has no backward pass"),
        (lambda q, k, v, *rest: formula(0.5 * q + 0.5 * q.detach(), k, v, *rest), "its gradients are others"),
        (lambda q, k, v, *rest: formula(q, k, v, *rest) * 1.5, "its answer is another one"),
        (lambda q, k, v, *rest: formula(q, k, v, *rest) * float("nan"), "its answer is another one"),
    ],
    ids=["forward", "backward", "detached", "part", "gradients", "answer", "nan"],
)
def test_what_is_wrong_is_taken_back(unet, xformers, attend, reason: str) -> None:
    xformers(attend)
    roles = roles_of(unet)
    kept = [processors(network) for network in networks_of(roles)]
    line = tried(roles, unet)
    assert line.startswith(f"--attention_backend xformers cannot be used by UNet2DConditionModel: {reason}"), line
    assert "native in 16 of 16 attention calls" in line and "\n" not in line
    assert [processors(network) for network in networks_of(roles)] == kept


def test_a_network_without_processors_that_take_it_says_so(unet, xformers) -> None:
    """The plain formula of older processors calls nothing that could be another kernel."""
    from diffusers.models.attention_processor import AttnProcessor

    xformers()
    roles = roles_of(unet)
    for network in networks_of(roles):
        network.set_attn_processor(AttnProcessor())
    assert "no attention layer takes it; no attention that can be told apart (Softmax) instead" in tried(roles, unet)


# What it goes together with.


def test_adapters_and_checkpointing_have_the_same_gradients(unet, xformers) -> None:
    """A block that runs again in the backward pass runs in the same backend, whatever role is on by then."""
    calls = xformers()

    def gradients(switch: bool) -> list[Tensor]:
        own = players(unet, separate=False, dtype=torch.float32, gradient_checkpointing=True)
        if switch:
            switch_attention([own.roles["student"].denoiser.network], "xformers")
        for role in own.roles.values():
            for parameter in role.parameters():
                parameter.grad = None
        answers = [own.roles[name].denoiser.raw(own.x_t, own.t, own.conditioning) for name in NAMES]
        sum(answer.square().mean() for answer in answers).backward()
        return [p.grad for role in own.roles.values() for p in role.parameters()]

    ordinary = gradients(False)
    assert not calls
    torch.testing.assert_close(gradients(True), ordinary, rtol=1e-4, atol=1e-6)
    assert calls["attention"] == 8 * (3 + 2), "three forward passes, and those of two adapters again"


@pytest.mark.parametrize("family", ["unet", "sd3"])
def test_a_derivative_is_not_computed_by_it(family: str, xformers) -> None:
    calls = xformers(refusing)
    recorded = record(FAMILIES[family]())
    with shaken(recorded.network):
        roles = roles_of(recorded)
        denoiser = roles["student"].denoiser
        x, t, conditioning = inputs(recorded)

        def derivative() -> Tensor:
            return derivative_along(lambda x: denoiser.raw(x, t, conditioning), (x,), (x.cos(),), denoiser.network)[1]

        expected = derivative()
        switch_attention([denoiser.network], "xformers")
        assert torch.equal(derivative(), expected) and bool(expected.any()) and not calls
        with pytest.raises(NotImplementedError):
            denoiser.raw(x, t, conditioning)


# The setting.


def test_it_is_of_the_machine_and_unknown_names_are_refused() -> None:
    assert "attention_backend" in names_of(RunConfig, "machine")
    assert {"auto", "native", "xformers", "flash", "flex"} <= set(known_backends())
    for name in ("best", "flash_hub", ""):
        with pytest.raises(UserError, match="--attention_backend") as refused:
            RunConfig(teacher="t", out="o", attention_backend=name)
        assert "\n" not in str(refused.value)


def test_a_run_says_it_once_and_its_student_knows_nothing_of_it(tmp_path: Path, xformers) -> None:
    calls, said = xformers(), []
    (tmp_path / "prompts.txt").write_text("a cat\na much longer prompt\n")
    settings = {"prompts": str(tmp_path / "prompts.txt"), "steps": 1, "report_to": "none", "cpu": True}
    method = "rectified_flow"
    config = method_class(method).Config(
        teacher="tiny", out=str(tmp_path / "run"), attention_backend="xformers", **settings
    )
    bench = open_workbench(config, "cpu", tiny_pipelines.tiny_stable_diffusion(), said.append)
    prepared = prepare(bench, method)
    assert [line for line in said if "attention" in line] == [
        f"attention of UNet2DConditionModel: xformers in {calls['attention']} of {calls['attention']} attention calls "
        "(Softmax), tried forward and backward"
    ]
    folder = tmp_path / "student"
    prepared.roles["student"].stock_network().save_pretrained(folder)
    assert "xformers" not in "".join(path.read_text() for path in folder.glob("*.json"))


def test_the_probe_tries_it(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert main(["probe", "fashion-sd", "--attention_backend", "xformers"]) == 0
    assert "xformers cannot be used by UNet2DConditionModel: xformers is not installed" in capsys.readouterr().out


def test_processors_are_told_apart(recording) -> None:
    words = describe_processors(recording.network)
    knows = hasattr(processors(recording.network)[0], "_attention_backend")
    assert ("by its own switch" if knows else "through SDPA") in words
