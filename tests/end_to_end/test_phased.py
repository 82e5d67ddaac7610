"""Students of several experts, from a stock teacher to a folder that stock diffusers samples without this package."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import WAN_CALL, dense_wan, tiny_flow, tiny_stable_diffusion, tiny_wan

import fewstep
from fewstep.cli import main
from fewstep.data.batch import Batch
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import rollout
from fewstep.errors import UserError
from fewstep.eval.models import student_model
from fewstep.export.apply import lora_files
from fewstep.export.own_code import is_own_code
from fewstep.programs.distillation import prepare, run
from fewstep.programs.methods import method_class
from fewstep.programs.workbench import Workbench, open_workbench
from fewstep.recording.watch.shake import shaken
from tests.stock_process import Sampled, sample_stock
from tests.whole_runs import whole_run

RUN = {"steps": 4, "max_steps": 4, "phase_steps": 2, "critic_updates": 1, "batch_size": 2, "log_steps": 1, "lr": 1e-2}
RUN |= {"report_to": "none", "cpu": True, "sample_steps": 0}
FLOW_CALL = {"height": 16, "width": 16, "max_sequence_length": 8}


def save(pipeline: Any, folder: Path, *networks: str) -> Path:
    """A teacher whose networks react to everything, and prompts beside it."""
    with shaken(*(getattr(pipeline, name) for name in networks)):
        pipeline.save_pretrained(folder)
    (folder.parent / "prompts.txt").write_text("a cat\na small dog\n", encoding="utf-8")
    return folder


def configured(teacher: Path, out: Path, **settings: Any) -> Any:
    settings = {**RUN, "prompts": str(teacher.parent / "prompts.txt"), **settings}
    return method_class("phased_dmd").Config(teacher=str(teacher), out=str(out), **settings)


@dataclass
class Student:
    """A finished run: its folder and ``fewstep.json``, and what training and stock diffusers make of one noise."""

    folder: Path
    about: dict[str, Any]
    expected: torch.Tensor
    sampled: Sampled = field(default_factory=Sampled)


def finished(place: Path, name: str, pipeline: Any, networks: tuple[str, ...], **settings: Any) -> Student:
    config = configured(save(pipeline, place / name / "teacher", *networks), place / name / "run", **settings)
    finished = whole_run(config, "phased_dmd")
    folder, bench = finished.folder, finished.bench
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        noise = torch.randn(1, *bench.recording.sample_shape, generator=generator)
        expected = rollout(finished.role, bench.sampler, noise, bench.conditions.select([0]))
    return Student(folder, json.loads((folder / "fewstep.json").read_text()), expected)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Student]:
    """Trained, exported, and sampled by one process without fewstep."""
    place = tmp_path_factory.mktemp("phased")
    lora = {"lora_rank": 4, "ema_decay": 0.5}
    both = ("transformer", "transformer_2")
    found = {
        "epsilon": finished(place, "epsilon", tiny_stable_diffusion(), ("unet",)),
        "flow": finished(place, "flow", tiny_flow(), ("transformer",), call=FLOW_CALL, **lora),
        "dense wan": finished(place, "dense", dense_wan(), ("transformer",), call=WAN_CALL, shift=7.0),
        # A step lies on the boundary itself, where the stock pipeline still calls the first network: it moves.
        "moved wan": finished(place, "moved", tiny_wan(), both, call=WAN_CALL, shift=7.0, **lora),
    }
    folders = [student.folder for student in found.values()]
    for student, sampled in zip(found.values(), sample_stock(place / "sampled.npz", *folders), strict=True):
        student.sampled = sampled
    return found


def check_sampled(student: Student, sampled: Sampled) -> None:
    """In all its steps the folder samples what the role does."""
    expected = student.expected
    torch.testing.assert_close(sampled.latents[4], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["epsilon", "flow", "dense wan", "moved wan"])
def test_stock_diffusers_samples_what_was_trained(students: dict[str, Student], name: str) -> None:
    student = students[name]
    check_sampled(student, student.sampled)
    assert student.about["counts"] == [2, 4]  # one step would leap over the end of the first phase


@pytest.mark.parametrize(("name", "network"), [("epsilon", "unet"), ("flow", "transformer")])
def test_any_pipeline_gets_room_for_a_second_network(students: dict[str, Student], name: str, network: str) -> None:
    student = students[name]
    assert student.about["code"] == "phased.py"
    assert student.sampled.called[2] == [network, f"{network}_2"]
    assert student.sampled.called[4] == [network] * 2 + [f"{network}_2"] * 2
    assert "trust_remote_code=True" in (student.folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["dense wan", "moved wan"])
def test_wans_own_pipeline_has_room_already(students: dict[str, Student], name: str) -> None:
    student = students[name]
    loaded = DiffusionPipeline.load_config(student.folder)
    assert (loaded["_class_name"], "code" in student.about) == ("WanPipeline", False)
    assert loaded["boundary_ratio"] == pytest.approx((0.875 + 21 / 22) / 2)  # between a step at 0.9545 and one at 0.875
    assert student.sampled.called[4] == ["transformer"] * 2 + ["transformer_2"] * 2


@pytest.mark.parametrize(
    ("family", "network"), [pytest.param("StableDiffusion", "unet", marks=pytest.mark.soak), ("Sana", "transformer")]
)
def test_pipelines_of_the_folder_become_students_of_two_experts(
    zoo: Path, tmp_path: Path, family: str, network: str
) -> None:
    if not (zoo / family).is_dir():
        pytest.skip(f"no {family} in {zoo}")
    told = json.loads((zoo / "manifest.json").read_text())[family]["call"]
    call = {name: value for name, value in told.items() if name not in ("prompt", "guidance_scale")}
    pipeline = DiffusionPipeline.from_pretrained(zoo / family)
    student = finished(tmp_path, family, pipeline, (network,), call=call, guidance_scale=told["guidance_scale"])
    (sampled,) = sample_stock(tmp_path / "sampled.npz", student.folder)
    check_sampled(student, sampled)


def test_where_the_boundary_stays_a_lora_of_each_network_is_enough(tmp_path: Path) -> None:
    teacher = save(tiny_wan(), tmp_path / "teacher", "transformer", "transformer_2")
    folder = run(configured(teacher, tmp_path / "run", call=WAN_CALL, shift=5.0, lora_rank=4), "phased_dmd")
    assert folder.name == "student_lora"
    assert set(lora_files(json.loads((folder / "fewstep.json").read_text()))) == {"transformer", "transformer_2"}


def test_fewstep_loads_its_own_code_unasked_and_no_other(students: dict[str, Student], tmp_path: Path) -> None:
    student = Path(shutil.copytree(students["epsilon"].folder, tmp_path / "student"))
    assert is_own_code(student)
    pipeline = fewstep.load(student)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", generator=torch.Generator().manual_seed(0), output_type="np").images
    assert image.shape == (1, 16, 16, 3)
    pipeline.save_pretrained(tmp_path / "copy")
    assert is_own_code(tmp_path / "copy")
    assert student_model(student).pipeline_class().__name__ == "StableDiffusionPipeline"
    out = str(tmp_path / "sample.png")
    assert main(["sample", str(student), "--prompt", "a cat", "--out", out]) == 0
    code = (student / "phased.py").read_text()
    for other in (code + "\nimport os\n", code.replace("('unet', 'unet_2')", "(print('x'), 'unet_2')")):
        assert other != code
        (student / "phased.py").write_text(other)
        assert not is_own_code(student)
        with pytest.raises(UserError, match="trust_remote_code"):
            fewstep.load(student)
    (student / "phased.py").write_text(code)
    (student / "unet" / "more.py").write_text("")
    assert not is_own_code(student)


# --- a teacher of two networks ----------------------------------------------------------------------------------------


def test_the_low_phase_of_two_experts_has_a_critic_at_all_times(tmp_path: Path) -> None:
    """The teacher of the last phase is two networks, so its critic is: at high times another one than in phase 1."""
    teacher = save(tiny_wan(), tmp_path / "teacher", "transformer", "transformer_2")
    bench = open_workbench(configured(teacher, tmp_path / "run", call=WAN_CALL, shift=7.0, batch_size=8), "cpu")
    method = prepare(bench, "phased_dmd")
    assert list(method.critics[1].experts) == ["transformer", "transformer_2"]
    called: set[str] = set()
    for name, expert in method.critics[1].experts.items():
        expert.denoiser.network.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    found = []
    for step in (0, 2):
        called.clear()
        conditioning, draws = bench.conditions.select([0] * 8), Draws(0, step, range(8))
        given = Batch(8, bench.recording.sample_shape, conditioning, draws, None, False)
        for turn in method.turns(step, given):
            if getattr(turn, "backward", None) and turn.role == "critic":
                found.append(set(called))
    assert found == [{"transformer"}, {"transformer", "transformer_2"}]


def test_phases_that_do_not_fit_the_teachers_networks_are_refused(tmp_path: Path) -> None:
    teacher = save(tiny_wan(), tmp_path / "teacher", "transformer", "transformer_2")
    opened = open_workbench(configured(teacher, tmp_path / "run", call=WAN_CALL, shift=5.0), "cpu").teacher
    for phases, message in (
        ([1, 3], r"phase 1 ends at timestep 937\.5, and the teacher's networks change at 875"),
        ([1, 1, 2], "has 2 networks, which change at timestep 875; give as many phases"),
    ):
        config = configured(teacher, tmp_path / "run", call=WAN_CALL, shift=5.0, phases=phases, max_steps=6)
        with pytest.raises(UserError, match=message):
            prepare(Workbench(config, opened, torch.device("cpu")), "phased_dmd")
