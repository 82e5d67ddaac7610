"""Roles that are divided over processes train as whole ones do; what runs them is tests/training/sharded_pair.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.training.divide import divide, tied, watch
from tests import tiny_pipelines
from tests.training.sharded_cases import CASES

ROOT = Path(__file__).parents[2]
#: Relative to the largest entry of each tensor; of a step's numbers to the largest of them.
LOSSES, GRADIENTS, WEIGHTS = 1e-6, 1e-5, 1e-4


def both_sides(out: Path, *names: str) -> dict[str, dict[str, float]]:
    words = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "training" / "sharded_pair.py"), str(out), *names]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "found.json").read_text())


def agrees(found: dict[str, float], name: str = "") -> bool:
    if found["averages"] != 0:  # tensors that are not, to the bit, what whole averages of whole students are
        return False
    if name == "dmd2_bf16":  # units change the order in which bfloat16 gradients of shared inputs are added
        return found["losses"] < 1e-3 and found["gradients"] < 2e-2 and found["weights"] < 1e-1
    # Their keys' biases, or those before a head's norms, have no gradient but rounding, which AdamW makes steps of.
    if name in ("dmd2_unet", "flash_dmd"):
        return found["losses"] < LOSSES and found["gradients"] < GRADIENTS and found["weights"] < 10 * WEIGHTS
    return found["losses"] < LOSSES and found["gradients"] < GRADIENTS and found["weights"] < WEIGHTS


@pytest.mark.soak
def test_adapters_on_a_divided_backbone_train_as_on_a_whole_one(tmp_path: Path) -> None:
    found = both_sides(tmp_path / "pair", "dmd2_lora")
    assert agrees(found["dmd2_lora"]), found


@pytest.mark.soak
def test_a_divided_run_resumes_to_the_bit_and_with_other_processes(tmp_path: Path) -> None:
    found = both_sides(tmp_path / "pair", "dmd2+resume", "dmd2_lora+resume", "rectified_flow+resume")
    for one in found.values():
        assert agrees(one), found
        assert one["again"] == one["back"] == 0, found
        assert one["one_to_several"] < WEIGHTS and one["several_to_one"] < WEIGHTS, found


@pytest.mark.soak
def test_every_method_and_option_trains_as_on_one_process(tmp_path: Path) -> None:
    found = both_sides(tmp_path / "pair", *CASES)
    apart = {name: one for name, one in found.items() if not agrees(one, name)}
    assert not apart, apart


def test_blocks_are_units_and_all_else_lies_in_units_that_are_called() -> None:
    pipeline = tiny_pipelines.tiny_flow()
    network = pipeline.transformer
    names = [name for name, _ in network.named_modules()]
    units = divide(network, {name: [frozenset(n for n in names if name.startswith(n) and n != name)] for name in names})
    assert {"transformer_blocks.0", "transformer_blocks.1"} <= set(units)
    assert units[-1] == "" and not any(name.startswith("transformer_blocks.0.") for name in units)


class Shared(nn.Module):
    """A block whose inner layer is called again when the block is not."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(20))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.blocks[0][1](x) * self.scale


def test_a_layer_that_is_called_outside_of_its_block_is_a_unit_of_its_own() -> None:
    network = Shared()
    units = divide(network, watch(network, lambda: network(torch.ones(1, 4))))
    assert units == ["blocks.0.1", *(f"blocks.{k}" for k in range(20)), ""]


def test_parameters_that_several_units_share_are_found() -> None:
    network = Shared()
    network.blocks[3][0].weight = network.blocks[7][0].weight
    units = divide(network, watch(network, lambda: network(torch.ones(1, 4))))
    assert tied(network, units) == [network.blocks[7][0].weight]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharding": "all"}, "--sharding must be one of none, full, hybrid"),
        ({"sharding": "full", "sharding_group": 2}, "--sharding_group belongs to --sharding hybrid"),
        ({"sharding_offload": True}, "--sharding_offload belongs to --sharding"),
        ({"sharding": "hybrid", "sharding_group": 0}, "--sharding_group must be at least 1"),
        ({"sharding": "full", "lora_rank": 2, "quantization": "torchao_int8"}, "--quantization cannot be divided"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunConfig(teacher="t", out="o", **settings)
