"""Images whose names are no UTF-8, as old archives unpack to, are inputs like others."""

import os
from pathlib import Path

import pytest
from PIL import Image

from fewstep.errors import UserError
from fewstep.trainers._rectified_flow_config import RectifiedFlowConfig
from fewstep.training.inputs import RunInputs
from fewstep.training.run_folder import check_folder, write_config

NAME = os.fsdecode(b"caf\xe9")  # Latin-1


def test_a_run_over_such_images_goes_on_and_names_what_changed(tmp_path: Path) -> None:
    try:
        (tmp_path / "data" / NAME).mkdir(parents=True)
    except OSError:
        pytest.skip("this system has no such names")
    (tmp_path / "data" / "bag").mkdir()
    for number, folder in enumerate((NAME, "bag")):
        Image.new("RGB", (16, 16), (90 * number, 9, 9)).save(tmp_path / "data" / folder / f"{NAME}.png")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    given = {"teacher": "fashion-sd", "data": str(tmp_path / "data"), "prompts": str(tmp_path / "prompts.txt")}
    config = RectifiedFlowConfig(out=str(tmp_path / "out"), **given)
    assert not check_folder(tmp_path / "out", "rectified_flow", config)
    inputs = RunInputs(config)
    assert inputs.check_here() == ""
    write_config(tmp_path / "out", "rectified_flow", config)
    inputs.write()

    config = RectifiedFlowConfig(out=str(tmp_path / "out"), resume=True, **given)
    check_folder(tmp_path / "out", "rectified_flow", config)
    assert RunInputs(config).check_here() == ""
    Image.new("RGB", (16, 16), (7, 9, 9)).save(tmp_path / "data" / NAME / f"{NAME}.png")
    with pytest.raises(UserError, match="is not what it was when the run") as caught:
        RunInputs(config).check_here()
    assert f"({NAME})" in str(caught.value)
