"""Networks that are no pipeline's: a 3-D teacher of procedural shapes from 25 steps to 2 and 1, and sparse samples."""

from pathlib import Path

import pytest
import torch
from mixture import energy_distance
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.programs.module import STUDENT, distill_module, sample_module

QUIET = {"cpu": True, "report_to": "none", "log_steps": 1000, "checkpointing_steps": 9000}
SHORT = {"max_steps": 2, "batch_size": 4, "lr": 1e-2}
SIDE = 4
GRID = (1, SIDE, SIDE, SIDE)


def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Voxel grids (N, 1, 4, 4, 4) in [-1, 1] and their kinds (N,): balls, boxes and shells of random size and place."""
    draw = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, SIDE)
    place = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    middle = 0.7 * torch.randn(count, 3, 1, 1, 1, generator=draw)
    size = 0.5 + 0.4 * torch.rand(count, 1, 1, 1, generator=draw)
    apart = place - middle
    ball, box = apart.norm(dim=1) - size, apart.abs().amax(1) - size
    kind = torch.randint(3, (count,), generator=draw)
    field = torch.stack([ball, box, ball.abs() - 0.3])[kind, torch.arange(count)]
    return torch.tanh(-4 * field)[:, None], kind.float()


class Voxels(nn.Module):
    """A velocity of voxel grids: two layers of the whole grid, beside a 3-D convolution."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.local = nn.Conv3d(1, 1, 3, padding=1)
        self.inner = nn.Linear(SIDE**3 + 6, width)
        self.middle = nn.Linear(width, width)
        self.outer = nn.Linear(width, SIDE**3)

    def forward(self, x: Tensor, timestep: Tensor, kind: Tensor) -> Tensor:
        t = timestep[:, None] / 1000
        kinds = torch.stack([kind == k for k in range(3)], 1).to(x)
        seen = torch.cat([x.flatten(1), t, torch.sin(3 * t), torch.cos(3 * t), kinds], 1)
        hidden = nn.functional.silu(self.inner(seen))
        hidden = hidden + nn.functional.silu(self.middle(hidden))
        return self.outer(hidden).view_as(x) + self.local(x)


class ExactVoxels(nn.Module):
    """The exact velocity of grids that are one of four shapes, small or large, and noise; beside it what is learnt."""

    STD = 0.3

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        axis = torch.linspace(-1, 1, SIDE)
        place = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
        ball = torch.stack([place.norm(dim=0) - radius for radius in (0.6, 1.0)])
        slab = torch.stack([place[0].abs() - radius for radius in (0.6, 1.0)])
        half = (place[0] - 0.2).expand_as(ball)
        fields = torch.stack([ball, slab, ball.abs() - 0.3, half], 1)
        self.register_buffer("means", torch.tanh(-4 * fields).flatten(2))
        layers = [nn.Linear(SIDE**3 + 2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.learnt = nn.Sequential(*layers, nn.Linear(width, SIDE**3))
        nn.init.zeros_(self.learnt[-1].weight)
        nn.init.zeros_(self.learnt[-1].bias)

    def forward(self, x: Tensor, timestep: Tensor, size: Tensor) -> Tensor:
        t, y = timestep[:, None] / 1000, x.flatten(1)
        means, variance = self.means[size.long()], (1 - t) ** 2 * self.STD**2 + t**2
        offset = y[:, None] - (1 - t)[:, None] * means
        share = torch.softmax(-offset.square().sum(2) / (2 * variance), 1)
        each = means + self.STD**2 * ((1 - t) / variance)[:, None] * offset
        x0 = (share[:, :, None] * each).sum(1)
        return ((y - x0) / t + self.learnt(torch.cat([y, t, size[:, None]], 1))).view_as(x)

    def drawn(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Grids (N, 1, 4, 4, 4) and their sizes (N,)."""
        draw = torch.Generator().manual_seed(seed)
        size, kind = (torch.randint(high, (count,), generator=draw) for high in (2, 4))
        return self.means[size, kind].view(-1, *GRID) + self.STD * torch.randn(
            count, *GRID, generator=draw
        ), size.float()


def unit(count: int, seed: int) -> Tensor:
    return torch.randn(count, *GRID, generator=torch.Generator().manual_seed(seed))


def test_a_voxel_teacher_of_25_steps_is_distilled_to_2_and_1(tmp_path: Path):
    """By energy distances to the teacher's 25 steps. Two draws of these: below 0.01; its one step 2.5, its two 0.62."""
    torch.manual_seed(0)
    teacher = ExactVoxels()
    x0, size = teacher.drawn(1000, 0)
    how = {"max_steps": 150, "batch_size": 128, "lr": 4e-3, "ema_decay": 0.95, "max_grad_norm": 1.0}
    student = distill_module(teacher, x0, {"size": size}, out=tmp_path, **QUIET, **how, normalization="norm/sqrt(dim)")

    def sampled(network: nn.Module, steps: int, seed: int) -> Tensor:
        return sample_module(network, unit(len(size), seed), {"size": size}, steps=steps).flatten(1)

    theirs = [sampled(teacher, 25, seed) for seed in (1, 2)]
    assert abs(energy_distance(*theirs)) < 0.01
    assert abs(energy_distance(theirs[0], x0.flatten(1))) < 0.01
    for steps in (1, 2):
        own, ours = (energy_distance(sampled(network, steps, 3), theirs[0]) for network in (teacher, student))
        assert ours < 0.6 * own, (steps, own, ours)


def test_the_students_weights_are_kept_and_its_teachers_are_as_they_were(tmp_path: Path):
    x0, kind = shapes(16, 0)
    torch.manual_seed(0)
    network = Voxels(8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    student = distill_module(network, x0, {"kind": kind}, out=tmp_path, **{**QUIET, **SHORT})
    kept = load_file(tmp_path / STUDENT)
    for name, value in before.items():
        assert torch.equal(network.state_dict()[name], value), name
        assert torch.equal(kept[name], student.state_dict()[name]), name
        assert not torch.equal(kept[name], value), name
    noise = torch.randn(3, 1, SIDE, SIDE, SIDE)
    told = {"kind": kind[:3]}
    once = sample_module(student, noise, told, steps=1)
    torch.testing.assert_close(once, noise - student(noise, torch.full((3,), 1000.0), kind[:3]))
    fresh = sample_module(student, noise, told, steps=2, renoise="fresh", step_noise=[noise])
    half = 0.5 * once + 0.5 * noise
    torch.testing.assert_close(fresh, half - 0.5 * student(half, torch.full((3,), 500.0), kind[:3]))


def test_a_run_is_gone_on_with_and_ends_as_if_it_had_not_been_cut(tmp_path: Path):
    x0, kind = shapes(32, 0)
    torch.manual_seed(0)
    network = Voxels(8)
    how = {**QUIET, "batch_size": 4, "lr": 1e-3, "ema_decay": 0.5, "guidance_scale": 3.0, "checkpointing_steps": 2}
    negative = {"kind": torch.tensor([-1.0])}
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    at_once = distill_module(network, x0, {"kind": kind}, out=whole, negative=negative, max_steps=4, **how)
    distill_module(network, x0, {"kind": kind}, out=cut, negative=negative, max_steps=2, **how)
    resumed = distill_module(network, x0, {"kind": kind}, out=cut, negative=negative, max_steps=4, resume=True, **how)
    for name, value in at_once.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_guidance_leads_away_from_what_is_named_and_keeps_each_samples_mask(tmp_path: Path):
    asked: list[tuple[list[float], int]] = []

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor, timestep: Tensor, label: Tensor, present: Tensor) -> Tensor:
            asked.append((label.tolist(), int(present.sum())))
            return x * self.scale + label.view(-1, 1, 1)

    mask = torch.tensor([[True, True, False], [True, False, False]])
    told, negative = {"label": torch.tensor([1.0, 2.0]), "present": mask}, {"label": torch.zeros(1)}
    how = {"guidance_scale": 3.0, "distillation_weight": 0.0, "max_steps": 1, "batch_size": 2}
    distill_module(Sparse(), torch.randn(2, 3, 3), told, out=tmp_path, negative=negative, **QUIET, **how)
    guided = [(labels, there) for labels, there in asked if len(labels) == 4]
    assert len(guided) == 1 and guided[0][0][:2] == [0.0, 0.0] and sorted(guided[0][0][2:]) == [1.0, 2.0]
    assert guided[0][1] == 6  # both masks twice


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dmd2", "gan_weight": 0.1}, "asks for the add_head of a pipeline, which a bare network lacks"),
        ({"lora_rank": 2}, "lora_rank belongs to pipelines"),
        ({"sharding": "full"}, "sharding belongs to pipelines"),
        ({"guidance_scale": 3.0}, "needs classifier-free guidance, which this teacher lacks"),
        ({"nonsense": 1}, "mdt_dist has no such setting"),
        ({"conditions": {"kind": torch.zeros(3)}}, "the condition kind has 3 rows for 8 samples"),
    ],
)
def test_what_a_bare_network_cannot_be_is_refused(settings: dict, message: str, tmp_path: Path):
    x0, kind = shapes(8, 0)
    with pytest.raises(UserError, match=message):
        distill_module(Voxels(4), x0, **{"conditions": {"kind": kind}, "out": tmp_path, **QUIET, **settings})


def test_an_answer_of_another_shape_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="the network answers"):
        distill_module(Wide(), torch.randn(4, 3), out=tmp_path, max_steps=1, batch_size=2, **QUIET)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(x)
