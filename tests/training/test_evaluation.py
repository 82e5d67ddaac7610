"""Evaluations of a run: the same samples every time, on any number of processes, judged by whoever is handed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toys import TinyNetwork, labels, role

from fewstep.config.run import RunConfig
from fewstep.diffusion.draws import EVALUATION_STEP, REFERENCE_STEP
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.errors import UserError
from fewstep.networks.roles import NetworkRole
from fewstep.recording.errors import RecordingError
from fewstep.training.best import Measure
from fewstep.training.distributed import Processes, join_launch
from fewstep.training.evaluation import Evaluation
from fewstep.training.samples import Samples
from tests.forked import well

CPU = torch.device("cpu")
SAMPLER = Sampler(FlowSchedule(), (1.0, 0.5), "fresh")


class ToyConditions:
    """Three labels."""

    of_sample: tuple[int, ...] = ()

    def __len__(self) -> int:
        return 3

    def items(self) -> list[int]:
        return [4, 5, 6]

    def texts(self) -> list[int]:
        return self.items()

    def shape(self, row: int) -> tuple[int, ...]:
        return self.of_sample

    def sizes(self) -> list:
        return [(self.of_sample, range(len(self)))]

    def select(self, rows: Sequence[int]):
        return labels([float(row) for row in rows])


class ToySamples(Samples):
    """Of shape (3, 2, 2), or videos (3, 5, 2, 2), whose pictures are a function of each place."""

    def __init__(self, config: RunConfig, shape: tuple[int, ...] = (3, 2, 2)) -> None:
        recording = SimpleNamespace(sample_shape=shape, schedule=FlowSchedule(), codec=None)
        conditions = ToyConditions()
        conditions.of_sample = shape
        super().__init__(config, recording, conditions, CPU, lambda told: told)

    def pictures(
        self, x0: torch.Tensor, indices: Sequence[int], pause: Callable[[], None] = lambda: None
    ) -> torch.Tensor:
        pause()
        return x0.sigmoid()


class ToyEvaluator:
    """Notes what it is shown."""

    name = "toy"

    def __init__(self, teacher_samples: int = 0) -> None:
        self.best = {"light": "highest", "dark": "lowest"}
        self.wanted = teacher_samples
        self.shown: list[tuple[torch.Tensor, list[int]]] = []
        self.teacher: tuple[torch.Tensor, list[int]] | None = None

    def teacher_samples(self) -> int:
        return self.wanted

    def show_teacher(self, pictures: torch.Tensor, asked: Sequence[int]) -> None:
        self.teacher = pictures, list(asked)

    def __call__(self, pictures: torch.Tensor, asked: Sequence[int]) -> Mapping[str, float]:
        self.shown.append((pictures, list(asked)))
        light = pictures.double().mean().item()
        return {"dark": 255 - light, "light": light, "another": 0.0}


def config(**settings) -> RunConfig:
    return RunConfig(**{"teacher": "toy", "out": "o", "eval_steps": 1, "batch_size": 3, "eval_samples": 8, **settings})


def student(size: int = 12) -> NetworkRole:
    torch.manual_seed(0)
    return role("student", TinyNetwork(size), FlowSchedule(), "flow")


def evaluation(one: ToyEvaluator, chosen: RunConfig, processes: Processes | None = None) -> Evaluation:
    return Evaluation(chosen, lambda _config, _device: one, CPU, processes or Processes())


def test_the_evaluator_sees_the_same_samples_every_time_and_what_they_were_asked_for():
    one, chosen = ToyEvaluator(), config()
    made = evaluation(one, chosen)
    samples = ToySamples(chosen)
    numbers = [made.numbers(samples, student(), SAMPLER) for _ in range(2)]
    assert numbers[0] == numbers[1] and list(numbers[0]) == ["eval/light", "eval/dark"]
    (pictures, asked), again = one.shown
    assert asked == [4, 5, 6, 4, 5, 6, 4, 5] and torch.equal(again[0], pictures)
    assert pictures.shape == (8, 3, 2, 2) and pictures.dtype == torch.uint8
    # Half grey levels are rounded up, as in an evaluation after the training.
    x0 = torch.cat([samples.x0(student(), SAMPLER, EVALUATION_STEP, some) for some in samples.batches(8)])
    assert torch.equal(pictures, (x0.sigmoid() * 255 + 0.5).floor().to(torch.uint8))


def test_the_samples_are_those_of_no_step_and_of_no_teacher():
    one, chosen = ToyEvaluator(teacher_samples=5), config()
    made, samples = evaluation(one, chosen), ToySamples(chosen)
    made.begin(samples, student())
    assert one.teacher is not None
    pictures, asked = one.teacher
    assert len(pictures) == 5 and asked == [4, 5, 6, 4, 5]
    noise = {step: samples.x0(lambda x_t, *_, end: x_t, SAMPLER, step, range(8)) for step in (0, -2, EVALUATION_STEP)}
    noise[REFERENCE_STEP] = samples.x0(lambda x_t, *_, end: x_t, SAMPLER, REFERENCE_STEP, range(8))
    assert len({float(value.sum()) for value in noise.values()}) == 4


def test_the_number_that_is_asked_for_must_be_among_those_that_there_are():
    assert evaluation(ToyEvaluator(), config()).measure == Measure("light", True, 8, "toy")
    assert evaluation(ToyEvaluator(), config(eval_metric="dark")).measure == Measure("dark", False, 8, "toy")
    with pytest.raises(UserError, match="--eval_metric fid: of these samples there are light, dark") as caught:
        evaluation(ToyEvaluator(), config(eval_metric="fid"))
    assert "\n" not in str(caught.value)
    other = config(eval_metric="dark")
    made = evaluation(ToyEvaluator(), other)
    made._evaluator = lambda pictures, asked: {"light": 1.0}
    with pytest.raises(UserError, match="--eval_metric dark: of these samples there are light"):
        made.numbers(ToySamples(other), student(), SAMPLER)
    with pytest.raises(UserError, match="--eval_steps: nobody here can judge samples"):
        Evaluation(config(), None, CPU, Processes())


def test_videos_are_shown_frame_by_frame_and_sound_is_refused():
    one, chosen = ToyEvaluator(), config(eval_samples=2)
    made = evaluation(one, chosen)
    made.numbers(ToySamples(chosen, (3, 5, 2, 2)), student(60), SAMPLER)
    assert one.shown[0][0].shape == (2, 5, 3, 2, 2)
    with pytest.raises(UserError, match="this teacher makes none"):
        made.numbers(ToySamples(chosen, (3, 4)), student(), SAMPLER)


def test_a_teacher_whose_pictures_cannot_be_made_is_refused_at_the_start():
    class Blind(ToySamples):
        def why_no_pictures(self) -> str:
            return str(RecordingError("no map to invert"))

    with pytest.raises(UserError, match="--eval_steps needs pictures of samples: no map to invert"):
        evaluation(ToyEvaluator(), config()).begin(Blind(config()), student())


def test_samples_that_are_not_finite_have_no_numbers():
    one = ToyEvaluator(teacher_samples=8)
    made, samples, broken = evaluation(one, config()), ToySamples(config()), student()
    with torch.no_grad():
        broken.denoiser.network.outer.bias[3] = float("nan")
    numbers = made.numbers(samples, broken, SAMPLER)
    assert all(value != value for value in numbers.values()) and len(numbers) == 2 and not one.shown
    with pytest.raises(UserError, match="the teacher's own samples are not finite"):
        made.begin(samples, broken)


@pytest.mark.parametrize("count", [7, 2], ids=["uneven", "fewer batches than processes"])
def test_the_processes_of_a_launch_share_the_samples_and_know_the_same_numbers(tmp_path: Path, count: int):
    chosen = config(eval_samples=count)
    alone = ToyEvaluator(teacher_samples=count)
    made = evaluation(alone, chosen)
    made.begin(ToySamples(chosen), student())
    numbers = made.numbers(ToySamples(chosen), student(), SAMPLER)

    def work(rank: int) -> None:
        accelerator = join_launch(cpu=True)
        one, samples = ToyEvaluator(teacher_samples=count), ToySamples(chosen)
        pauses: list[None] = []
        shared = evaluation(one, chosen, Processes(rank, accelerator.num_processes))
        assert shared.measure == made.measure
        shared.begin(samples, student())
        assert shared.numbers(samples, student(), SAMPLER, lambda: pauses.append(None)) == numbers
        rounds, calls = -(-len(samples.batches(count)) // 3), 2
        assert len(pauses) == rounds * (calls + 1)  # as many on each process
        if rank == 0:
            for ours, theirs in zip([one.teacher, *one.shown], [alone.teacher, *alone.shown], strict=True):
                assert torch.equal(ours[0], theirs[0]) and ours[1] == theirs[1]
        else:
            assert not one.shown and one.teacher is None

    well(3, work, tmp_path)


def test_what_the_evaluator_refuses_is_refused_on_all_processes(tmp_path: Path):
    class Refusing(ToyEvaluator):
        def __call__(self, pictures: torch.Tensor, asked: Sequence[int]) -> Mapping[str, float]:
            raise UserError("pictures of another size")

    def work(rank: int) -> None:
        processes = Processes(rank, join_launch(cpu=True).num_processes)
        made = evaluation(Refusing(), config(), processes)
        with pytest.raises(UserError, match="pictures of another size"):
            made.numbers(ToySamples(config()), student(), SAMPLER)
        with pytest.raises(UserError, match="--eval_metric fid"):
            evaluation(ToyEvaluator(), config(eval_metric="fid"), processes)

    well(2, work, tmp_path)
