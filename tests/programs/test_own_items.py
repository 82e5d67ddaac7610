"""An embedded teacher that looks at pictures has items of its own, as those of text have prompts."""

from __future__ import annotations

import pytest

from fewstep.fashion.items import inpainting_items
from fewstep.programs import given_items as giving
from fewstep.teachers.loading import load_teacher


def test_an_embedded_teacher_that_looks_has_training_pictures_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giving, "OWN_ITEMS", 3)
    pipeline = load_teacher("fashion-inpaint")
    own = giving.given_items(None, None, pipeline, {}, name="fashion-inpaint")
    assert own is not None
    expected = inpainting_items(3, pictures="training")
    for one, other in zip(own.each, expected, strict=True):
        assert one.subject == other.subject
        for name in ("image", "mask_image"):
            assert one.arguments[name].tobytes() == other.arguments[name].tobytes()
    wanted = [item.arguments["target"].tobytes() for item in expected]
    assert [target.tobytes() for target in own.targets] == wanted
    assert giving.given_items(None, None, pipeline, {}, name="runs/another") is None
    told = giving.given_items(expected[:2], None, pipeline, {}, name="fashion-inpaint")
    assert told is not None and len(told) == 2
