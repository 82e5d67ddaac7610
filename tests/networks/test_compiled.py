"""Compiled networks: few graphs, the same numbers, and the network itself wherever a graph would lose something.

Graphs are counted and compared without generating code, and of a small network: what a compiler makes of them, and
stock networks, are for `make soak` and for test_adapters.py.
"""

import copy
from collections.abc import Callable, Iterator

import pytest
import tiny_pipelines
import torch
import torch._dynamo
import toys
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import forward_ad

from fewstep.conditioning.conditioning import Conditioning
from fewstep.config.checks import names_of
from fewstep.config.run import RunConfig
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.errors import UserError
from fewstep.networks.attention import switch_attention
from fewstep.networks.compile_trial import compile_roles
from fewstep.networks.compiled import CompiledForms, CompiledNetwork
from fewstep.networks.features import find_tap
from fewstep.networks.head_role import HeadRole
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.networks.roles import NetworkRole
from fewstep.networks.second_time import attach_second_time
from fewstep.recording import record
from fewstep.recording.watch.hooks import hooked
from fewstep.recording.watch.shake import shaken


class Counting:
    """A backend that keeps every graph, which runs as it was traced or, ``differentiated`` ahead, by AOTAutograd."""

    def __init__(self, differentiated: bool = False, most: int | None = None, scale: float = 1.0) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.differentiated, self.most, self.scale = differentiated, most, scale

    def __call__(self, graph: torch.fx.GraphModule, given: list[Tensor]) -> Callable[..., object]:
        if len(self.graphs) == self.most:
            raise RuntimeError("no more\ngraphs")
        self.graphs.append(graph)
        run = aot_eager(graph, given) if self.differentiated else graph.forward
        return lambda *args: [self.scale * out if isinstance(out, Tensor) else out for out in run(*args)]


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Attending(nn.Module):
    """Stock attention over the entries of a sample, and a stock group norm; it takes toys.PlainRecipe's arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(query_dim=4, heads=2, dim_head=2)
        self.norm = nn.GroupNorm(2, 6)
        self.enter, self.leave = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        told = torch.stack([1e-3 * timestep, label], 1).to(x.dtype)[:, None].expand(-1, x.shape[1], -1)
        return self.leave(self.norm(self.attention(self.enter(torch.cat([x[:, :, None], told], 2)))))[:, :, 0]


def roles_of(*names: str, attending: bool = False) -> dict[str, NetworkRole]:
    torch.manual_seed(0)
    names = names or ("teacher", "student", "critic")
    networks = {name: Attending() if attending else toys.TinyNetwork(6) for name in names}
    return {name: toys.role(name, networks[name], FlowSchedule(), "flow", name != "teacher") for name in names}


def is_plain(role: NetworkRole) -> bool:
    return role.denoiser.form(role.denoiser.network) is role.denoiser.network


def inputs(size: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(size))
    return x, torch.full((size,), 0.5, dtype=torch.float64), toys.labels([1.0] * size)


def compiled(roles, backend: Counting) -> tuple[str, list[str]]:
    said: list[str] = []
    return compile_roles(roles, *inputs(), said.append, backend), said


# How many graphs there are.


def test_a_graph_for_each_role_and_shape() -> None:
    count, roles = Counting(), roles_of()
    line, _ = compiled(roles, count)
    assert line.startswith("compiled: teacher, student, critic (TinyNetwork) in "), line
    assert len(count.graphs) == 3, "those of the trial are those of the training"

    def step(size: int) -> None:
        x, t, conditioning = inputs(size)
        with torch.no_grad():
            for role in roles.values():
                role.denoiser(x, t, conditioning)
        for name in ("student", "critic"):
            roles[name].denoiser(x, t, conditioning).square().mean().backward()

    for _ in range(2):
        step(2)
        assert len(count.graphs) == 5, "and those of student and critic without a gradient"
    for size in (3, 4, 5):
        step(size)
        assert len(count.graphs) == 10, "one more for each, for all sizes"


def test_the_roles_of_two_runs_do_not_use_up_each_others_graphs() -> None:
    """Graphs hang on a function's code, to which torch allows so many of them."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for number in range(4):
            count = Counting()
            compiled(roles_of("student"), count)
            assert len(count.graphs) == 1, f"run {number}"


# The same numbers.


def test_gradients_of_all_roles_at_once_are_those_without() -> None:
    def gradients(backend: Counting | None) -> list[Tensor]:
        roles = roles_of()
        for name, role in roles.items() if backend else ():
            role.denoiser.form = CompiledForms(name, backend)
        x, t, conditioning = inputs()
        answer = roles["student"].denoiser(x, t, conditioning)
        others = [roles[name].denoiser(answer, t, conditioning) for name in ("critic", "teacher")]
        (others[0] - 2 * others[1]).square().mean().backward()
        return [p.grad for role in roles.values() for p in role.parameters()]

    count = Counting(differentiated=True)
    torch.testing.assert_close(gradients(count), gradients(None), rtol=1e-5, atol=1e-6)
    assert len(count.graphs) == 3


def test_half_precision() -> None:
    roles, count = roles_of("student"), Counting()
    roles["student"].denoiser.autocast = torch.bfloat16
    line, _ = compiled(roles, count)
    assert line.startswith("compiled: student"), line
    assert len(count.graphs) == 1 and roles["student"].denoiser.raw(*inputs()).dtype is torch.bfloat16


def test_a_switched_attention_is_traced() -> None:
    roles, count = roles_of("student", attending=True), Counting()
    switch_attention([roles["student"].denoiser.network], "_native_math")
    line, _ = compiled(roles, count)
    assert line.startswith("compiled: student") and len(count.graphs) == 1


# Where the network itself runs.


def test_a_derivative_is_that_of_the_network() -> None:
    """A compiled function has no tangent under forward_ad, and a missing one would read as zero."""
    roles = roles_of("student")
    denoiser, (x, t, conditioning) = roles["student"].denoiser, inputs()

    def derivative() -> Tensor | None:
        with forward_ad.dual_level():
            answer = denoiser.raw(forward_ad.make_dual(x, x.cos()), t, conditioning)
            return forward_ad.unpack_dual(answer).tangent

    expected = derivative()
    compiled(roles, Counting(differentiated=True))
    assert isinstance(denoiser.form(denoiser.network), CompiledNetwork)
    found = derivative()
    assert found is not None and bool(found.any()) and torch.equal(found, expected)


def test_hooks_see_every_pass() -> None:
    roles, seen = roles_of("student"), []
    compiled(roles, Counting())
    denoiser, given = roles["student"].denoiser, inputs()
    expected = denoiser.raw(*given)
    with hooked({"inner": denoiser.network.inner}, after=lambda name, *_: seen.append(name)):
        torch.testing.assert_close(denoiser.raw(*given), expected)
    assert seen == ["inner"]
    denoiser.raw(*given)
    assert seen == ["inner"]


def test_a_second_time_and_averages_are_not_compiled() -> None:
    roles = roles_of("teacher", "student", "ema")
    for name in ("student", "ema"):
        attach_second_time(roles[name], "network", {"inner": 16}, False, 0)
    line, _ = compiled(roles, Counting())
    assert line.startswith("compiled: teacher (") and line.endswith("; not student, which is told a second time"), line
    assert is_plain(roles["student"])
    assert is_plain(roles["ema"])
    alone, _ = compiled({"student": roles["student"]}, Counting())
    assert alone == "--compile: nothing is compiled: student is told a second time"


def test_heads_alone_need_no_graph() -> None:
    """Their features end a pass early, at a hook: a graph of the teacher for them would cost minutes and never run."""
    roles, count = roles_of("teacher", "student"), Counting()
    line, _ = compiled({**roles, "discriminator": HeadRole("discriminator", roles["teacher"])}, count)
    assert line.startswith("compiled: teacher, student (") and len(count.graphs) == 2, line


def test_the_exported_network_is_a_plain_one() -> None:
    roles = roles_of()
    networks = {name: role.stock_network() for name, role in roles.items()}
    names = {name: list(role.state_dict()) for name, role in roles.items()}
    compiled(roles, Counting())
    assert all(role.stock_network() is networks[name] for name, role in roles.items())
    assert {name: list(role.state_dict()) for name, role in roles.items()} == names
    copy.deepcopy(networks["student"])


# What cannot be compiled.


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (Counting(most=0), "no more graphs"),
        (Counting(most=1), "no more graphs"),
        (Counting(scale=1.1), "the compiled teacher is 1e-01 from the plain one, and 1e-03 is allowed"),
        (Counting(scale=float("nan")), "the compiled teacher is nan from the plain one"),
    ],
    ids=["first", "second", "another answer", "nan"],
)
def test_nothing_is_compiled_where_one_cannot_be(backend: Counting, reason: str) -> None:
    roles = roles_of()
    line, said = compiled(roles, backend)
    assert line.startswith("--compile: nothing is compiled: ") and reason in line and "\n" not in line, line
    assert not said
    assert all(is_plain(role) for role in roles.values())


def test_a_shape_that_cannot_be_compiled_later_runs_as_it_is() -> None:
    roles = roles_of("student")
    _, said = compiled(roles, Counting(most=1))
    denoiser, given = roles["student"].denoiser, inputs(3)
    answers = [denoiser.raw(*given) for _ in range(2)]
    assert len(said) == 1 and said[0].startswith("--compile: the student's TinyNetwork stays uncompiled: "), said
    denoiser.form = lambda network: network
    assert all(torch.equal(answer, denoiser.raw(*given)) for answer in answers)


def test_the_setting_is_of_the_machine_and_not_for_divided_networks() -> None:
    assert "compile" in names_of(RunConfig, "machine")
    with pytest.raises(UserError, match="--compile traces whole networks"):
        RunConfig(teacher="t", out="o", compile=True, sharding="full")


# With a compiler, and stock networks.


@pytest.mark.soak
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2, "gradient_checkpointing": True}], ids=["copies", "adapters"])
@pytest.mark.parametrize("build", [tiny_pipelines.tiny_flow, tiny_pipelines.tiny_stable_diffusion])
def test_stock_networks_through_a_compiler(build, settings, monkeypatch) -> None:
    recording = record(build())
    x = torch.randn(2, *recording.sample_shape, generator=torch.Generator().manual_seed(0))
    given = (x, torch.full((2,), 0.5, dtype=torch.float64), Conditioning(recording.marked, 1).select([0, 0]))
    with shaken(recording.network):
        names = ("student", "critic")
        roles = make_roles(RoleSettings(**settings), recording, names, torch.device("cpu"))
        line = compile_roles(roles, *given, print)
        assert line.startswith("compiled: teacher, student, critic (") and "answers and gradients as without" in line, (
            line
        )
        critic = roles["critic"].denoiser
        tap = find_tap(critic.network, lambda x: critic.raw(x, *given[1:]), x)
        tapped = critic.features(*given, tap)
        critic.form = lambda network: network
        assert torch.equal(tapped, critic.features(*given, tap))


@pytest.mark.soak
def test_without_a_compiler_nothing_is_compiled(monkeypatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    roles, said = roles_of("student"), []
    with config.patch(force_disable_caches=True):
        line = compile_roles(roles, *inputs(), said.append)
    assert line.startswith("--compile: nothing is compiled: ") and "compiler" in line, line
    assert is_plain(roles["student"])
