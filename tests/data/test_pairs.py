"""Pairs: both ends of the teacher's own ODE, the same whoever makes them, and refused where they do not fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_pipelines import tiny_ddim, tiny_dit, tiny_edm, tiny_flow, tiny_stable_diffusion
from torch import Tensor

from fewstep.cli import main
from fewstep.data.captioned import captioned
from fewstep.data.conditions import Conditions
from fewstep.data.fingerprint import teacher_digest
from fewstep.data.images import read_images
from fewstep.data.pair_stream import PairStream
from fewstep.data.pairs import PairMaker, PairSettings, StoredPairs, pair_noise
from fewstep.diffusion.draws import keyed_order
from fewstep.diffusion.ode import OdeSolver, teacher_times
from fewstep.diffusion.prediction import add_noise, expand
from fewstep.errors import UserError
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import make_role
from fewstep.programs.cache import cache
from fewstep.programs.distillation import distill
from fewstep.programs.pairs import make_pairs
from fewstep.recording import Recording, record
from fewstep.recording.watch.shake import shaken

SETTINGS = {"num": 5, "teacher_steps": 3, "batch_size": 2, "shard_size": 4, "cpu": True}


def stored(folder: Path, recording: Recording, **items) -> StoredPairs:
    return StoredPairs(folder, teacher_digest(recording), Conditions(recording, **items))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na dog\nb\n")
    return str(path)


@pytest.fixture(scope="module")
def dit_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "dit"
    return make_pairs(tiny_dit(), out=str(folder), classes="0-2", guidance_scale=1.0, **SETTINGS)


@pytest.mark.parametrize(
    ("builder", "call", "guidance"),
    [(tiny_flow, {"max_sequence_length": 8}, 2.0), (tiny_stable_diffusion, {}, 3.0), (tiny_edm, {}, 1.0)],
    ids=["flow", "table", "edm"],
)
@pytest.mark.parametrize("solver", ["euler", pytest.param("heun", marks=pytest.mark.soak)])
def test_a_pair_is_noise_and_what_the_guided_teacher_makes_of_it(
    builder, call: dict, guidance: float, solver: str, prompts: str, tmp_path: Path
):
    pipeline = builder()
    settings = {**SETTINGS, "prompts": prompts, "call": call, "guidance_scale": guidance, "solver": solver}
    folder = make_pairs(pipeline, out=str(tmp_path / "pairs"), **settings)
    recording = record(pipeline, **call, guidance_scale=guidance)
    conditions = Conditions(recording, prompts=["a cat", "a dog", "b"])
    pairs = StoredPairs(folder, teacher_digest(recording), conditions)
    assert len(pairs) == 5
    x0, noise, item = pairs.row(4)
    assert sorted({pairs.row(i)[2] for i in range(3)}) == [0, 1, 2]  # every item as often as any other
    schedule = recording.schedule
    guided = GuidedDenoiser(make_role("teacher", recording, trainable=False), guidance)
    shift = 3.0 if builder is tiny_flow else 1.0  # the flow teacher's own
    with torch.no_grad():
        start = schedule.initial_scale() * noise[None]
        ode_solver = OdeSolver(guided, schedule, solver)
        own = ode_solver.to_data(start, teacher_times(schedule, 3, shift), conditions.select([item]))
    torch.testing.assert_close(x0, own[0], rtol=1e-4, atol=1e-4 * float(own.abs().max()))


@pytest.mark.soak
def test_the_pairs_are_bit_equal_for_any_processes_and_after_kills(tmp_path: Path):
    script = Path(__file__).parents[1] / "tiny_pairs.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["2"]  # both kills hit
    alone = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    assert len(alone) == 11 + 1
    for other in ("together", "apart", "killed"):
        found = {path.name: path.read_bytes() for path in (tmp_path / other).iterdir() if path.suffix != ".partial"}
        assert found == alone, other


def test_a_stream_goes_through_all_pairs_and_mixes_inverted_ones_in(dit_pairs: Path):
    recording = record(tiny_dit())
    conditions = Conditions(recording, labels=[0, 1, 2])
    pairs = StoredPairs(dit_pairs, teacher_digest(recording), conditions)
    batch = PairStream(pairs, conditions, "cpu").batch(0, range(5))
    expected = {tuple(pairs.row(i)[1].flatten()[:3].tolist()) for i in range(5)}
    assert {tuple(noise.flatten()[:3].tolist()) for noise in batch.noise} == expected
    assert batch.x0.shape == (5, 4, 8, 8) and batch.conditioning.batch_size == 5

    class Inverted(StoredPairs):
        def row(self, index: int):
            return torch.ones(4, 8, 8), torch.ones(4, 8, 8), 0

    mixed = PairStream(pairs, conditions, "cpu", Inverted(dit_pairs, teacher_digest(recording), conditions), share=0.25)
    whole = mixed.batch(0, range(400)).x0.flatten(1).eq(1).all(1)
    assert 70 < int(whole.sum()) < 130
    parts = torch.cat([mixed.batch(0, range(k, k + 100)).x0 for k in range(0, 400, 100)]).flatten(1).eq(1).all(1)
    assert torch.equal(whole, parts)


def test_real_images_are_paired_with_the_noise_that_leads_to_them(tmp_path: Path):
    pipeline, data = tiny_ddim(), tmp_path / "data"
    data.mkdir()
    for number in range(8):
        Image.new("RGB", (8, 8), (30 * number, 90, 200 - 20 * number)).save(data / f"{number}.png")
    recording = record(pipeline)
    conditions = Conditions(recording)
    real = captioned(read_images(str(data)), recording, conditions)
    # A random network is no denoiser; for data of unit variance this is the exact one, whose ODE keeps x_t as it is.
    alpha_of = recording.schedule.coefficients
    settings = PairSettings(num=3, steps=40, solver="heun", batch_size=2, shard_size=2)

    def denoiser(x_t: Tensor, t: Tensor, conditioning, end: Tensor | None = None) -> Tensor:
        return expand(alpha_of(t).alpha, x_t) * x_t

    identity = teacher_digest(recording)
    PairMaker(tmp_path / "pairs", recording, identity, denoiser, conditions, settings, "cpu", real).run()
    pairs = StoredPairs(tmp_path / "pairs", identity, conditions)
    x0, noise = (torch.stack([pairs.row(index)[part] for index in range(3)]) for part in (0, 1))
    # Three of eight, and not the first three: in a folder those would be of one class.
    chosen = [keyed_order(0, "images", 8, index) for index in range(3)]
    assert sorted(chosen) != [0, 1, 2]
    expected = torch.tensor([[30.0 * n, 90, 200 - 20 * n] for n in chosen]) / 127.5 - 1
    torch.testing.assert_close(x0.mean((2, 3)), expected, rtol=0, atol=1e-5)
    # The way up begins with a little noise, at the table's first entry.
    little = pair_noise(0, range(3), recording.sample_shape)
    first = recording.schedule.coefficients(torch.full((3,), 1 / 1000, dtype=torch.float64))
    torch.testing.assert_close(noise, add_noise(x0, little, first), rtol=0, atol=0.01)
    assert float((noise - x0).abs().mean()) < 0.05


def test_an_encoded_cache_serves_as_well(prompts: str, tmp_path: Path):
    cached = cache(tiny_stable_diffusion(), tmp_path / "cache", prompts=prompts, cpu=True)
    settings = {**SETTINGS, "num": 2, "guidance_scale": 2.0}
    one = make_pairs(tiny_stable_diffusion(), out=str(tmp_path / "one"), prompts=prompts, **settings)
    two = make_pairs(tiny_stable_diffusion(), out=str(tmp_path / "two"), cache=str(cached), **settings)
    assert (one / "about.json").read_text() == (two / "about.json").read_text()
    name = "shard_000000.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes()


def test_what_an_image_shows_must_be_among_the_conditions(tmp_path: Path):
    for name in ("1", "7"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "data" / name / "a.png")
    settings = {"data": str(tmp_path / "data"), "out": str(tmp_path / "pairs"), "cpu": True, "teacher_steps": 2}
    with pytest.raises(UserError, match="--data shows 7, which is not among"):
        make_pairs(tiny_dit(), classes="0-5", **settings)
    pairs = stored(make_pairs(tiny_dit(), classes="7,3,1", **settings), record(tiny_dit()), labels=[7, 3, 1])
    assert [pairs.row(index)[2] for index in range(2)] == [0, 2]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_pairs_of_another_teacher_are_refused_by_name(dit_pairs: Path):
    other = tiny_dit()
    with torch.no_grad():
        next(other.transformer.parameters()).add_(1e-3)
    with pytest.raises(UserError, match="of another teacher: its transformer differs"):
        stored(dit_pairs, record(other), labels=[0, 1, 2])
    with pytest.raises(
        UserError, match="of another teacher: its schedule, text_encoder, tokenizer, transformer, unet differs"
    ):
        stored(dit_pairs, record(tiny_stable_diffusion()), prompts=["a"])


def test_pairs_of_another_text_encoder_are_refused_by_name(prompts: str, tmp_path: Path):
    pipeline = tiny_stable_diffusion()
    folder = make_pairs(pipeline, out=str(tmp_path / "pairs"), prompts=prompts, **SETTINGS)
    settings = {"prompts": prompts, "steps": 1, "max_steps": 1, "batch_size": 2, "cpu": True, "report_to": "none"}
    settings |= {"pairs": str(folder), "sample_steps": 0, "lora_rank": 2}
    with shaken(pipeline.text_encoder), pytest.raises(UserError, match="of another teacher: its text_encoder differs"):
        distill(pipeline, "rectified_flow", out=str(tmp_path / "other"), **settings)
    pipeline.save_pretrained(tmp_path / "teacher")  # whose encoder is freed before the pairs are opened
    assert distill(tmp_path / "teacher", "rectified_flow", out=str(tmp_path / "run"), **settings).is_dir()


def test_pairs_for_other_conditions_are_refused(dit_pairs: Path):
    with pytest.raises(UserError, match="made for other prompts or classes"):
        stored(dit_pairs, record(tiny_dit()), labels=[0, 1, 3])


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    assert main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewstep: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teachers") / "ddim"
    tiny_ddim().save_pretrained(folder)
    return str(folder)


def test_the_command_makes_goes_on_and_refuses_in_one_line(teacher: str, tmp_path: Path, capsys):
    out = str(tmp_path / "pairs")
    words = ["pairs", "--teacher", teacher, "--out", out, "--num", "5", "--teacher_steps", "2", "--cpu"]
    words += ["--batch_size", "2", "--shard_size", "2"]
    assert main(words) == 0
    assert f"--pairs {out}" in capsys.readouterr().out
    assert "--resume" in refused(capsys, words)
    shard = tmp_path / "pairs" / "shard_000001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-7])

    distil = ["distill", "rectified_flow", "--teacher", teacher, "--cpu", "--report_to", "none", "--max_steps", "1"]
    assert "truncated" in refused(capsys, [*distil, "--out", str(tmp_path / "run"), "--pairs", out])
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds nothing" in refused(capsys, [*distil, "--out", str(tmp_path / "run"), "--pairs", str(empty)])
    assert not (tmp_path / "run" / "config.yaml").exists()

    assert main([*words, "--resume"]) == 0
    assert shard.read_bytes() == content
    assert main([*distil, "--out", str(tmp_path / "run"), "--pairs", out, "--batch_size", "2"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--num is needed"),
        (["--num", "0"], "--num must be at least 1"),
        (["--num", "2", "--solver", "rk45"], "euler, heun"),
        (["--num", "2", "--rank", "0"], "go together"),
        (["--num", "2", "--rank", "2", "--world", "2"], "2 of 2"),
        (["--num", "2", "--classes", "0-1"], "conditioned on nothing"),
        (["--num", "2", "--data", "nowhere"], "not a folder"),
    ],
)
def test_bad_settings_are_refused(words: list[str], said: str, teacher: str, tmp_path: Path, capsys):
    out = ["--out", str(tmp_path / "pairs"), "--cpu"]
    assert said in refused(capsys, ["pairs", "--teacher", teacher, *out, *words])


def test_more_pairs_than_images_are_refused(teacher: str, tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8)).save(data / "a.png")
    with pytest.raises(UserError, match="--num 2 is more than the 1 images"):
        make_pairs(teacher, out=str(tmp_path / "pairs"), data=str(data), num=2, cpu=True)
    with pytest.raises(UserError, match="no such setting"):
        make_pairs(teacher, out=str(tmp_path / "pairs"), number=2)
