"""A run makes no more pairs than it will use, and what it trains on does not depend on how long it is meant to be."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import tiny_ddim, tiny_dit
from torch import Tensor

from fewstep.config.pairs import PairsWanted
from fewstep.data.batch import Pairs
from fewstep.data.conditions import Conditions
from fewstep.data.durable import json_sha256
from fewstep.data.pair_stream import PairStream, numbers_used
from fewstep.data.pairs import FORMAT, RUN_FORMAT, PairMaker, PairSettings, StoredPairs
from fewstep.diffusion.draws import keyed_generator, keyed_order
from fewstep.errors import UserError
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.programs.distillation import distill
from fewstep.programs.pairs import make_pairs
from fewstep.programs.planning.dry_run import DryRun
from fewstep.recording import record
from fewstep.trainers._rectified_flow_config import RectifiedFlowConfig
from tests.checkpoints import load_latest

RUN = {"steps": 1, "batch_size": 4, "pair_steps": 2, "guidance_scale": 1.0, "sample_steps": 0, "report_to": "none"}
RUN |= {"cpu": True, "lr": 1e-2, "lora_rank": 2}


def rows(folder: Path) -> int:
    return sum(len(load_file(file)["x0"]) for file in folder.glob("shard_*"))


def weights(out: Path) -> dict[str, Tensor]:
    return load_latest(out / "checkpoints")[1]["student"]


def of(folder: Path) -> str:
    return json.loads((folder / "about.json").read_text())["format"]


@pytest.mark.parametrize(("method", "extra"), [("mean_flow", {"lora_rank": 0}), ("rectified_flow", {})])
def test_a_short_run_makes_the_pairs_that_it_will_use(method: str, extra: dict, tmp_path: Path):
    """By default they are 8,192, for 2 steps of 4 samples."""
    distill(tiny_dit(), method, classes="0-2", out=str(tmp_path), max_steps=2, **{**RUN, **extra})
    assert rows(tmp_path / "pairs") == 2 * 4


def test_after_a_roll_back_a_short_run_takes_the_pairs_that_it_has(tmp_path: Path):
    recording = record(tiny_ddim())
    conditions = Conditions(recording)
    network = NetworkDenoiser(recording.network, recording.recipe, recording.schedule, recording.prediction_type)

    def made(name: str, used: list[int]) -> StoredPairs:
        about = (tmp_path / name, recording, {}, network, conditions, PairSettings(num=100, steps=1), "cpu")
        PairMaker(*about, numbers=used).run()
        return StoredPairs(tmp_path / name, {}, conditions, used)

    few, none = made("pairs", [70, 3, 41]), made("none", [])
    held = {float(few.row(number)[0].sum()) for number in few.numbers}
    for mixed in ((), (few, 0.5), (none, 0.9)):
        seen = PairStream(few, conditions, "cpu", *mixed).batch(10_003, range(40)).x0
        assert {float(x0.sum()) for x0 in seen} == held
    assert len(PairStream(none, conditions, "cpu", few, 0.1).batch(10_003, range(4)).x0) == 4


@pytest.mark.soak
def test_a_short_run_goes_on_after_a_roll_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own, calls = PairStream.batch, iter(range(100))

    def spoilt(self: PairStream, seed: int, positions: Sequence[int]) -> Pairs:
        made = own(self, seed, positions)
        return Pairs(made.x0 * torch.nan, made.noise, made.conditioning) if next(calls) == 5 else made

    monkeypatch.setattr(PairStream, "batch", spoilt)
    settings = {**RUN, "classes": "0-2", "max_steps": 8, "checkpointing_steps": 2, "rollbacks": 1}
    distill(tiny_dit(), "rectified_flow", out=str(tmp_path), **settings)
    (noted,) = json.loads((tmp_path / "checkpoints" / "rollbacks.json").read_text())
    assert (noted["from"], noted["to"]) == (6, 4) and rows(tmp_path / "pairs") == 8 * 4


def test_a_run_that_goes_on_for_longer_makes_the_others_and_is_the_same(tmp_path: Path):
    settings = {**RUN, "classes": "0-2", "num_pairs": 40, "gradient_accumulation_steps": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    distill(tiny_dit(), "rectified_flow", out=str(whole), max_steps=4, **settings)
    distill(tiny_dit(), "rectified_flow", out=str(parts), max_steps=2, **settings)
    assert (rows(whole / "pairs"), rows(parts / "pairs")) == (32, 16)
    distill(tiny_dit(), "rectified_flow", out=str(parts), max_steps=4, resume=True, **settings)
    files = [(out / "pairs" / "shard_000000.safetensors").read_bytes() for out in (whole, parts)]
    assert files[0] == files[1]
    assert all(torch.equal(value, weights(parts)[name]) for name, value in weights(whole).items())
    distill(tiny_dit(), "rectified_flow", out=str(parts), max_steps=9, resume=True, **settings)  # into the next epoch
    assert rows(parts / "pairs") == 40
    with pytest.raises(UserError, match=f"holds '{RUN_FORMAT}', not '{FORMAT}'"):
        distill(tiny_dit(), "rectified_flow", out=str(tmp_path / "other"), pairs=str(parts / "pairs"), **settings)


def test_a_run_that_uses_all_has_them_in_the_order_of_their_numbers(tmp_path: Path):
    """So do runs that an earlier version began, and short ones among them are gone on with."""
    settings = {**RUN, "classes": "0-2", "num_pairs": 8}
    distill(tiny_dit(), "rectified_flow", out=str(tmp_path), max_steps=2, **settings)
    assert of(tmp_path / "pairs") == FORMAT and rows(tmp_path / "pairs") == 8
    shutil.rmtree(tmp_path / "checkpoints")  # as of a run that was stopped before its first
    distill(tiny_dit(), "rectified_flow", out=str(tmp_path), max_steps=1, resume=True, **settings)
    assert of(tmp_path / "pairs") == FORMAT


def test_of_mixed_pairs_those_are_made_that_are_drawn(tmp_path: Path):
    (tmp_path / "data").mkdir()
    for number in range(8):
        Image.new("RGB", (8, 8), (30 * number, 90, 200)).save(tmp_path / "data" / f"{number}.png")
    settings = {**RUN, "data": str(tmp_path / "data"), "inverted_share": 0.25, "num_pairs": 50, "max_steps": 2}
    settings.pop("guidance_scale")
    distill(tiny_ddim(), "rectified_flow", out=str(tmp_path / "run"), **settings)
    inverted = [float(torch.rand((), generator=keyed_generator(0, "inverted", p))) < 0.25 for p in range(8)]
    assert 0 < sum(inverted) < 6
    assert rows(tmp_path / "run" / "inverted_pairs") == sum(inverted)
    assert rows(tmp_path / "run" / "pairs") == 8 - sum(inverted)


def test_the_numbers_are_those_of_the_stream_each_once():
    wanted = PairsWanted(5, 2, "euler")
    order = [keyed_order(3, "pairs", 5, position) for position in range(9)]
    assert numbers_used(wanted, 5, 3, 3, inverted=False) == order[:3]
    assert numbers_used(wanted, 5, 3, 9, inverted=False) == order[:5]
    mixed = PairsWanted(5, 2, "euler", invert_real=True, inverted_share=0.5)
    both = [numbers_used(mixed, 1000, 3, 64, inverted=which) for which in (True, False)]
    assert sum(map(len, both)) == 64 and min(map(len, both)) > 20
    assert (
        numbers_used(mixed, 1000, 3, 32, inverted=True)
        == both[0][: len(numbers_used(mixed, 1000, 3, 32, inverted=True))]
    )


def test_a_plan_counts_what_is_made(tmp_path: Path):
    for steps, made in ((2, 8), (5000, 8192)):
        config = RectifiedFlowConfig(teacher="t", out=str(tmp_path), max_steps=steps, batch_size=4, pair_steps=3)
        assert DryRun(config, "rectified_flow", record(tiny_ddim())).pair_evaluations == made * 3


def test_pairs_of_other_images_are_not_gone_on_with(tmp_path: Path):
    data, out = tmp_path / "data", tmp_path / "pairs"
    data.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (30 * number, 90, 200)).save(data / f"{number}.png")
    settings = {"out": str(out), "teacher_steps": 1, "batch_size": 1, "shard_size": 1, "cpu": True}
    make_pairs(tiny_ddim(), data=str(data), **settings)
    (out / "shard_000002.safetensors").unlink()
    data.rename(tmp_path / "moved")
    data = tmp_path / "moved"
    make_pairs(tiny_ddim(), data=str(data), resume=True, **settings)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(data / "1.png")
    with pytest.raises(UserError, match="begun with another images"):
        make_pairs(tiny_ddim(), data=str(data), resume=True, **settings)
    about = json.loads((out / "about.json").read_text())  # as an earlier version wrote it
    del about["images"], about["sha256"]
    (out / "about.json").write_text(json.dumps({**about, "sha256": json_sha256(about)}))
    make_pairs(tiny_ddim(), data=str(data), resume=True, **settings)
    assert StoredPairs(out, about["teacher"], Conditions(record(tiny_ddim()))).about == about
