"""What a run says of the weights that it starts with; that they are the right ones is tried by whole runs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.recording import record
from fewstep.training.checkpoint import save
from fewstep.training.initialization import initialize


@pytest.mark.parametrize(
    ("names", "more"), [(["student"], ""), (["student", "critic"], "; the critic starts from the teacher")]
)
def test_a_critic_is_spoken_of_where_there_is_one(tmp_path: Path, names: list[str], more: str) -> None:
    pipeline, init = tiny_pipelines.tiny_ddim(), str(tmp_path / "pipeline")
    pipeline.save_pretrained(init)
    recording = record(pipeline)
    roles = make_roles(RoleSettings(), recording, tuple(names), torch.device("cpu"))
    said: list[str] = []
    initialize(roles, init, recording, said.append)
    assert said == [f"the student starts from {init}{more}"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda state: {f"network.unet.{k.removeprefix('network.')}": v for k, v in state.items()}, "as many networks"),
        (lambda state: {k: v[:1] for k, v in state.items()}, "has other weights for the student .* more"),
        (lambda state: {**state, "second_time.weight": torch.zeros(1)}, "was trained to be told a second time"),
        (
            lambda state: {f"speed_up.{k}": v for k, v in state.items()},
            "holds an adapter of speed_up_net .* same method",
        ),
    ],
    ids=["of two networks", "of another shape", "of two times", "of speed_up_net"],
)
def test_a_run_whose_student_is_made_of_something_else_is_refused_in_one_short_line(
    changed: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    recording = record(tiny_pipelines.tiny_ddim())
    roles = make_roles(RoleSettings(), recording, ("student",), torch.device("cpu"))
    tensors = {"student": changed(roles["student"].state_dict())}
    save(tmp_path / "checkpoints", 1, tensors, {}, 1)
    with pytest.raises(UserError, match=message) as caught:
        initialize(roles, str(tmp_path), recording, print)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
