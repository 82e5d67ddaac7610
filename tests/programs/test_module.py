"""Networks that are no pipeline's: voxel grids of procedural shapes, and objects of unequally many voxels."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.programs.module import STUDENT, distill_module, sample_module

QUIET = {"cpu": True, "report_to": "none", "log_steps": 1000, "checkpointing_steps": 9000}
SHORT = {"max_steps": 2, "batch_size": 4, "lr": 1e-2}
SIDE = 4


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
