"""A folder of pipelines needs no manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pipeline_folder
from tiny_pipelines import tiny_ddim, tiny_dit, tiny_stable_diffusion


def test_every_pipeline_of_a_folder_is_found_and_called(tmp_path: Path, pytestconfig, monkeypatch) -> None:
    made = {"a": tiny_ddim(), "b": tiny_dit(), "c": tiny_stable_diffusion()}
    for name, pipeline in made.items():
        pipeline.save_pretrained(tmp_path / name)
    (tmp_path / "notes").mkdir()
    monkeypatch.setattr(pytestconfig.option, "zoo", tmp_path)
    monkeypatch.setattr(pytestconfig.option, "zoo_given", True)
    assert pipeline_folder.names(pytestconfig, sample=True) == ["a", "b", "c"]
    calls = {name: pipeline_folder.call_of(tmp_path, name, pipeline) for name, pipeline in made.items()}
    assert calls == {"a": {}, "b": {"class_labels": [1]}, "c": {"prompt": "a b lower"}}
    (tmp_path / "manifest.json").write_text(json.dumps({"c": {"call": {"prompt": "x", "height": 16}}}))
    assert pipeline_folder.call_of(tmp_path, "c", made["c"]) == {"prompt": "x", "height": 16}
    assert pipeline_folder.call_of(tmp_path, "a", made["a"]) == {}
    assert pipeline_folder.denoiser(made["a"]) is made["a"].unet
