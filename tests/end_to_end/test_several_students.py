"""Several students of one teacher, from the command's run to one pipeline that stock diffusers samples, routed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_dit, tiny_stable_diffusion

import fewstep
from fewstep.cli import main
from fewstep.errors import UserError
from fewstep.eval.conditions import SampleConditions
from fewstep.eval.generate import generate
from fewstep.eval.models import student_model
from fewstep.export.own_code import is_own_code
from fewstep.programs.distillation import run
from fewstep.programs.methods import method_class
from fewstep.programs.planning.plan import plan
from fewstep.recording.watch.shake import shaken
from tests.stock_process import run_stock

RUN = {"steps": 2, "max_steps": 2, "critic_updates": 1, "batch_size": 2, "log_steps": 1, "lr": 1e-1}
RUN |= {"report_to": "none", "cpu": True, "sample_steps": 0}
PROMPTS = ("a cat", "a small dog", "a large dog", "two cats")


def configured(teacher: Path, out: Path, **settings: Any) -> Any:
    return method_class("multi_student").Config(teacher=str(teacher), out=str(out), **{**RUN, **settings})


def saved(pipeline: Any, network: str, folder: Path) -> Path:
    with shaken(getattr(pipeline, network)):
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two students of a class-conditional teacher, whose samples get fresh noise between their steps."""
    place = tmp_path_factory.mktemp("labels")
    teacher = saved(tiny_dit(), "transformer", place / "teacher")
    lists = {"partition": "lists", "lists": ["0,3", "1-2"]}
    run(configured(teacher, place / "run", classes="0-3", renoise="fresh", **lists), "multi_student")
    return place / "run"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two students of a text-conditioned teacher, adapters."""
    place = tmp_path_factory.mktemp("prompts")
    teacher = saved(tiny_stable_diffusion(), "unet", place / "teacher")
    (place / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    settings = {"prompts": str(place / "prompts.txt"), "students": 2, "lora_rank": 4, "ema_decay": 0.5}
    run(configured(teacher, place / "run", **settings), "multi_student")
    return place / "run"


_STOCK = """
import json, sys
import diffusers, numpy, torch
out, subject, requests, joined, *alone = sys.argv[1:]
requests = json.loads(requests)
about = json.load(open(f"{joined}/fewstep.json"))
saved = {}
for folder in (joined, *alone):
    trust = {"trust_remote_code": True} if folder == joined else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **about["load"], **trust)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(number) for number in range(len(requests))]
    call = {**about["call"], subject: requests, "generator": generators, "output_type": "np"}
    torch.manual_seed(0)
    saved[folder] = pipeline(**call).images
numpy.savez(out, **saved)
"""


def stock_samples(run_folder: Path, place: Path, subject: str, requests: list[Any]) -> list[numpy.ndarray]:
    """Pictures (B, ...) of the joined pipeline, then of student 1 and 2 alone, in a process without fewstep."""
    folders = [run_folder / "student", *(run_folder / f"student_{k}" / "student" for k in (1, 2))]
    run_stock(_STOCK, str(place), subject, json.dumps(requests), *map(str, folders))
    with numpy.load(place) as file:
        return [file[str(folder)] for folder in folders]


def test_stock_diffusers_asks_each_prompts_own_student(prompts: Path, tmp_path: Path) -> None:
    joined, *alone = stock_samples(prompts, tmp_path / "seen.npz", "prompt", [*PROMPTS])
    assert float(abs(alone[0] - alone[1]).max()) > 1e-3  # they are two students
    owners = [0, 0, 1, 1]
    for row, owner in enumerate(owners):
        numpy.testing.assert_allclose(joined[row], alone[owner][row], atol=1e-5)


def test_a_sample_has_the_noise_of_its_own_generator_whoever_its_neighbours_are(labels: Path) -> None:
    """DiT hands no generator to its scheduler; a student that makes some of the samples draws from theirs."""
    model = student_model(labels)
    pipeline = model.load(torch.device("cpu"), torch.float32)
    conditions = SampleConditions("label", (0, 1, 2, 3), (0, 1, 2, 3))
    call = {**model.call, "num_inference_steps": 2}

    def sampled(size: int) -> list[torch.Tensor]:
        parts = generate(pipeline, call, conditions, range(4), seed=0, batch_size=size)
        one = next(parts)
        assert one.evaluations == 2
        return [one.images, *(part.images for part in parts)]

    def apart(one: torch.Tensor, other: torch.Tensor) -> int:
        return int((one.int() - other.int()).abs().max())

    assert apart(torch.cat(sampled(4)), torch.cat(sampled(1))) <= 1
    owners = [student_model(labels / f"student_{k}").load(torch.device("cpu"), torch.float32) for k in (1, 2)]
    alone = [next(generate(o, call, conditions, range(4), seed=0, batch_size=4)).images for o in owners]
    assert apart(*alone) > 2
    expected = torch.stack([alone[owner][row] for row, owner in enumerate((0, 1, 1, 0))])
    assert apart(torch.cat(sampled(4)), expected) <= 1


def test_what_no_student_knows(labels: Path, prompts: Path) -> None:
    of_labels, of_prompts = fewstep.load(labels / "student"), fewstep.load(prompts / "student")
    of_labels.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="no student was trained for 7"):
        of_labels(class_labels=[7])
    # A prompt goes to the student whose prompts it is most like, and is seen without a draw of torch's own.
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert of_prompts.route("a small dog ") == 0
    router = of_prompts.router
    router.register_to_config(known={})
    assert [of_prompts.route(prompt) for prompt in PROMPTS] == nearest(of_prompts, router)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="which student is asked"):
        of_prompts(prompt_embeds=torch.zeros(1, 9, 16))
    alone = of_prompts.student(1)
    assert type(alone).__name__ == "StableDiffusionPipeline"
    assert alone.unet is of_prompts.unet_2


def nearest(pipeline: Any, router: Any) -> list[int]:
    """By the embedding that the pipeline's own encoder gives."""
    embeddings = [pipeline.encode_prompt(prompt, "cpu", 1, False)[0].mean(1)[0] for prompt in PROMPTS]
    centroids = torch.stack([torch.stack(embeddings[:2]).mean(0), torch.stack(embeddings[2:]).mean(0)])
    torch.testing.assert_close(centroids, router.centroids.detach(), rtol=1e-4, atol=1e-5)
    return [int((centroids - one).norm(dim=1).argmin()) for one in embeddings]


def test_one_call_for_several_samples_of_a_prompt_and_saved_again(prompts: Path, tmp_path: Path) -> None:
    pipeline = fewstep.load(prompts / "student")
    pipeline.set_progress_bar_config(disable=True)

    def pictures(of: Any, **call: Any) -> numpy.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        words = {"num_images_per_prompt": 2, "generator": generators, "output_type": "np", **call}
        return of(["two cats", "a cat"], **words)

    together = pictures(pipeline).images
    assert together.shape[0] == 4
    singles = [
        pipeline(prompt, generator=torch.Generator().manual_seed(seed), output_type="np").images[0]
        for seed, prompt in enumerate(("two cats", "two cats", "a cat", "a cat"))
    ]
    numpy.testing.assert_allclose(together, numpy.stack(singles), atol=1e-5)
    images, unsafe = pictures(pipeline, return_dict=False, output_type="pil")
    assert (len(images), unsafe) == (4, None)
    numpy.testing.assert_allclose(numpy.stack([numpy.array(i) for i in images]) / 255, together, atol=1e-2)
    pipeline.save_pretrained(tmp_path / "again")
    assert is_own_code(tmp_path / "again")
    numpy.testing.assert_allclose(pictures(fewstep.load(tmp_path / "again")).images, together, atol=1e-6)


def test_evaluation_and_plan(labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = json.loads((labels / "student" / "fewstep.json").read_text())
    assert (about["students"], about["code"]) == (["transformer", "transformer_2"], "multi_student.py")
    assert "part" not in about
    card = (labels / "student" / "README.md").read_text()
    assert "Which of its students a request goes to is decided by `multi_student.py`" in card
    assert main(["sample", str(labels / "student"), "--class", "2", "--out", str(tmp_path / "sample.png")]) == 0
    assert (tmp_path / "sample.png").is_file()
    steps = plan(str(labels.parent / "teacher"), "multi_student", **{**RUN, "classes": "0-3", "students": 2})
    assert steps.calls["student"].to_parameters == 1


def digests(folder: Path) -> dict[str, float]:
    """The sums of a student's weights."""
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return {name: float(value.double().sum()) for name, value in weights.items()}


def test_one_student_alone_is_that_of_all_and_a_run_goes_on_from_it(labels: Path, tmp_path: Path) -> None:
    """With one of them made elsewhere, and again when nothing is left to do."""
    teacher, lists = labels.parent / "teacher", {"partition": "lists", "lists": ["0,3", "1-2"], "classes": "0-3"}
    settings = {**lists, "renoise": "fresh"}
    out = tmp_path / "run"
    alone = run(configured(teacher, out / "student_2", only_student=2, **settings), "multi_student")
    assert digests(alone) == digests(labels / "student_2" / "student")
    made = (alone / "fewstep.json").stat().st_mtime_ns
    run(configured(teacher, out, **settings), "multi_student")
    assert (alone / "fewstep.json").stat().st_mtime_ns == made
    for k, network in (1, "transformer"), (2, "transformer_2"):
        joined = load_file(out / "student" / network / "diffusion_pytorch_model.safetensors")
        theirs = load_file(labels / f"student_{k}" / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(joined[name], theirs[name]) for name in theirs)
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        run(configured(teacher, out, **settings), "multi_student")
    shutil.rmtree(out / "student")
    run(configured(teacher, out, resume=True, **settings), "multi_student")
    assert (out / "student" / "model_index.json").is_file()
    with pytest.raises(UserError, match="lists differ"):
        run(configured(teacher, out, resume=True, **{**settings, "lists": ["0", "1-3"]}), "multi_student")


def test_one_student_of_one_part_is_dmd2s(labels: Path, tmp_path: Path) -> None:
    teacher = labels.parent / "teacher"
    settings = {**RUN, "classes": "1-2", "renoise": "fresh"}
    one = run(configured(teacher, tmp_path / "one", students=1, only_student=1, **settings), "multi_student")
    plain = run(method_class("dmd2").Config(teacher=str(teacher), out=str(tmp_path / "dmd2"), **settings), "dmd2")
    assert digests(one) == digests(plain)
    assert digests(one) == digests(labels / "student_2" / "student")  # which knows 1 and 2 of 0-3


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Path]:
    from PIL import Image

    generator = numpy.random.default_rng(0)
    for label in range(4):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for number in range(2):
            pixels = generator.integers(0, 255, (16, 16, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / str(label) / f"{number}.png")
    yield tmp_path / "images"


def test_smaller_students(labels: Path, tmp_path: Path, images: Path) -> None:
    """They have fresh weights, learn from real images of their own labels first, and are joined like others."""
    settings = {"classes": "0-3", "students": 2, "student_network": {"num_layers": 1}, "pretraining_steps": 1}
    out = tmp_path / "run"
    student = run(configured(labels.parent / "teacher", out, data=str(images), **settings), "multi_student")
    pipeline = fewstep.load(student)
    assert (pipeline.transformer.config.num_layers, pipeline.transformer_2.config.num_layers) == (1, 1)
    rows = [json.loads(line) for line in (out / "student_1" / "metrics.jsonl").read_text().splitlines()]
    assert ["student/pretraining" in row for row in rows if "student/gradient_norm" in row] == [True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"students": 5}, "4 labels are too few for --students 5"),
        ({"partition": "clusters"}, "--partition clusters divides prompts"),
        ({"partition": "lists", "lists": ["0", "1-2"]}, "each label once, and 3 is there 0 times"),
        ({"partition": "lists", "lists": ["0-2", "2-3"]}, "each label once, and 2 is there 2 times"),
        ({"partition": "lists", "lists": ["0-3", "9"]}, "9, which is not among the run's labels"),
        ({"student_network": {"layers": 1}, "init": "x", "pretraining_steps": 0}, "has no setting layers"),
        (
            {"student_network": {"in_channels": 3}, "init": "x", "pretraining_steps": 0},
            "cannot be asked as the teacher",
        ),
        ({"student_network": {"num_layers": "a"}, "init": "x", "pretraining_steps": 0}, "no DiTTransformer2DModel can"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_is_trained(
    labels: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    out = tmp_path / "run"
    settings |= {"init": str(labels / "student_1")} if "init" in settings else {}
    with pytest.raises(UserError, match=message):
        run(configured(labels.parent / "teacher", out, **{"classes": "0-3", **settings}), "multi_student")
    assert not out.exists()  # the mended command needs no --resume
