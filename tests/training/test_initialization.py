"""What a run says of the weights that it starts with; that they are the right ones is tried by whole runs."""

from pathlib import Path

import pytest
import tiny_pipelines
import torch

from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.recording import record
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
