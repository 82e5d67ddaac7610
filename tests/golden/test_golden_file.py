"""The golden comparison itself: what it does not know must fail by name, never pass by being overlooked."""

import json
import math
from pathlib import Path

import pytest
import torch
from golden_file import GoldenFile
from safetensors.torch import save_file

from fewstep.diffusion.schedule import EDMSchedule


def golden(tmp_path: Path, **options) -> GoldenFile:
    tensors = {
        "in.noise0": torch.zeros(1),
        "in.noise1": torch.ones(1),
        "exp.loss": torch.tensor(2.0, dtype=torch.float64),
    }
    metadata = {"case": "a_case", "options": json.dumps(options), "tolerance": "relative 1e-9 of the largest entry"}
    save_file(tensors, tmp_path / "variant.safetensors", metadata=metadata)
    return GoldenFile(tmp_path / "variant.safetensors")


def test_an_unknown_option_value_fails_by_name(tmp_path: Path):
    with pytest.raises(AssertionError, match=r"variant.safetensors: unknown reduction = 'sum'.*mean"):
        golden(tmp_path, reduction="sum").choice("reduction", "mean")


def test_an_option_that_no_comparison_read_fails_by_name(tmp_path: Path):
    file = golden(tmp_path, reduction="mean", surprise=1)
    file.choice("reduction", "mean")
    file.check("loss", torch.tensor(2.0))
    with pytest.raises(AssertionError, match="surprise"):
        file.finish()


def test_an_option_that_another_one_makes_idle_is_no_unknown_one(tmp_path: Path):
    file = golden(tmp_path, guidance_form="none", guidance_scale=1.0)
    file.check("loss", torch.tensor(2.0))
    with pytest.raises(AssertionError, match="guidance_form, guidance_scale"):
        file.finish()  # nobody has looked
    file.choice("guidance_form", "none")
    file.finish()
    file = golden(tmp_path, guidance_form="u+w*(c-u)", guidance_scale=2.0)
    file.check("loss", torch.tensor(2.0))
    file.choice("guidance_form", "u+w*(c-u)")
    with pytest.raises(AssertionError, match="options guidance_scale"):
        file.finish()


@pytest.mark.parametrize(("word", "told"), [("t", 3.0), ("ln(sigma)/4", 0.25 * math.log(3))])
def test_an_edm_networks_time_is_the_noise_level_or_its_logarithm(word: str, told: float, tmp_path: Path):
    schedule = EDMSchedule(sigma_data=0.5)
    timestep = schedule.timestep(schedule.time_from_sigma(torch.tensor([3.0], dtype=torch.float64)))
    assert golden(tmp_path, toy_time=word).toy_time(schedule)(timestep).item() == pytest.approx(told)


def test_a_result_that_no_comparison_looked_at_fails_by_name(tmp_path: Path):
    with pytest.raises(AssertionError, match=r"exp\.loss"):
        golden(tmp_path).finish()


def test_the_tolerance_of_the_metadata_is_kept(tmp_path: Path):
    file = golden(tmp_path)
    file.check("loss", torch.tensor(2.0 + 1e-9, dtype=torch.float64))
    with pytest.raises(AssertionError, match=r"loss is 5\.00e-09 off"):
        file.check("loss", torch.tensor(2.0 + 1e-8, dtype=torch.float64))
    with pytest.raises(AssertionError, match="shape"):
        file.check("loss", torch.full((1,), 2.0))


def test_numbered_inputs_come_in_order(tmp_path: Path):
    assert [tensor.item() for tensor in golden(tmp_path).inputs("noise")] == [0, 1]
