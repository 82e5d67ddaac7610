"""Conditioning: marking, batching, selecting, saving."""

from __future__ import annotations

import pytest
import torch

from fewstep.conditioning.conditioning import Conditioning, Leaf, SampleList, mark, remark


def _arguments(batch: int, length: int = 4) -> dict:
    """Arguments of a video network: text, per-frame text, ids, nested dicts and tuples, lists, plain values."""
    row = torch.arange(batch, dtype=torch.float32).view(-1, 1, 1)
    return {
        "text": row + torch.zeros(batch, length, 2),
        "frames": (row + torch.zeros(batch, 3, 2)).flatten(0, 1),
        "ids": torch.arange(6).view(3, 2),
        "nested": {"pooled": row[:, 0], "none": None},
        "tables": (torch.ones(3, dtype=torch.complex64), torch.tensor([True, False])),
        "shapes": [[(1, 2, i)] for i in range(batch)],
        "ragged": [torch.full((i + 1, 2), float(i)) for i in range(batch)],
        "width": 8,
        "scale": (0.5, 2),
        "return_dict": False,
    }


def _conditioning(batch: int = 1, length: int = 4) -> Conditioning:
    marked = mark(_arguments(1, length), _arguments(2, length))
    return remark(_arguments(batch, length), marked, batch)


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_mark_tells_per_sample_from_shared() -> None:
    tree = mark(_arguments(1), _arguments(2))
    assert tree["text"].rows == 1 and tree["frames"].rows == 3 and tree["ids"].rows == 0
    assert tree["nested"]["pooled"].rows == 1 and tree["nested"]["none"] == Leaf(None)
    assert isinstance(tree["shapes"], SampleList) and tree["shapes"].rows == 1
    assert isinstance(tree["tables"], tuple) and tree["width"] == Leaf(8)


def test_mark_at_several_samples() -> None:
    tree = mark(_arguments(2), {**_arguments(4)}, samples=2)
    assert tree["text"].rows == 1 and tree["frames"].rows == 3 and tree["ragged"].rows == 1


@pytest.mark.parametrize(
    ("one", "two", "words"),
    [
        (torch.zeros(3, 1), torch.zeros(3, 2), r"float32\[3, 1\] for one sample and float32\[3, 2\] for two"),
        (1, 2, "1 for one sample and 2 for two"),
        (None, torch.zeros(2), "None for one sample"),
    ],
)
def test_mark_refuses_what_it_does_not_understand(one: object, two: object, words: str) -> None:
    with pytest.raises(ValueError, match=f"the argument a is {words}"):
        mark({"a": one}, {"a": two})


def test_remark_refuses_another_structure() -> None:
    marked = mark(_arguments(1), _arguments(2))
    with pytest.raises(ValueError, match=r"nested.none is float32\[1\] here and was None, shared"):
        remark({**_arguments(1), "nested": {"pooled": torch.zeros(1, 1), "none": torch.zeros(1)}}, marked, 1)
    with pytest.raises(ValueError, match="'width'"):
        remark({k: v for k, v in _arguments(1).items() if k != "width"}, marked, 1)


def test_rows_must_fit_the_batch() -> None:
    with pytest.raises(ValueError, match="text has 2 rows for 3 samples"):
        Conditioning({"text": Leaf(torch.zeros(2, 4), 1)}, 3)


def test_cat_and_select_are_inverses() -> None:
    both = _conditioning(2)
    parts = [both.select([0]), both.select(torch.tensor([1]))]
    assert _same(Conditioning.cat(parts).arguments(), both.arguments())
    assert _same(both.select([1, 0]).select([1, 0]).arguments(), both.arguments())
    assert both.select([1]).arguments()["shapes"] == [[(1, 2, 1)]]
    assert both.select([1]).arguments()["frames"].tolist() == [[1.0, 1.0]] * 3


def test_select_expands_a_batch_of_one() -> None:
    many = _conditioning().select([0] * 5)
    assert many.batch_size == 5 and many.arguments()["frames"].shape == (15, 2)
    assert len(many.arguments()["ragged"]) == 5 and many.arguments()["ids"].shape == (3, 2)


@pytest.mark.parametrize("index", [[], [1], [-1]])
def test_select_refuses_what_is_not_there(index: list[int]) -> None:
    with pytest.raises(IndexError, match=r"indices in 0\.\.0"):
        _conditioning().select(index)


def test_cat_names_what_does_not_agree() -> None:
    short, long = _conditioning(1, 4), _conditioning(1, 5)
    assert not Conditioning.compatible(short, long)
    with pytest.raises(ValueError, match=r"0 and 1 cannot form one batch: text is float32\[1, 4, 2\].*\[1, 5, 2\]"):
        Conditioning.cat([short, long])
    with pytest.raises(ValueError, match="at least one"):
        Conditioning.cat([])


def test_shared_values_must_be_equal() -> None:
    def with_width(width: int) -> Conditioning:
        return Conditioning({**_conditioning().tree, "width": Leaf(width)}, 1)

    assert Conditioning.compatible(with_width(8), with_width(8))
    assert Conditioning.mismatch(with_width(8), with_width(9)) == "width is 8, shared in one and 9, shared in the other"


def test_to_casts_real_floating_leaves_only() -> None:
    moved = _conditioning().to(dtype=torch.bfloat16).arguments()
    assert moved["text"].dtype == moved["ragged"][0].dtype == moved["nested"]["pooled"].dtype == torch.bfloat16
    assert moved["ids"].dtype == torch.int64 and moved["tables"][0].dtype == torch.complex64
    assert moved["tables"][1].dtype == torch.bool and moved["scale"] == (0.5, 2)


def test_arguments_are_fresh_containers() -> None:
    conditioning = _conditioning()
    conditioning.arguments()["nested"]["none"] = 1
    assert conditioning.arguments()["nested"]["none"] is None


def test_unconditional() -> None:
    nothing = Conditioning({}, 1)
    assert nothing.arguments() == {} and nothing.select([0] * 3).batch_size == 3
    assert Conditioning.cat([nothing, nothing]).batch_size == 2
    with pytest.raises(ValueError, match="at least one sample"):
        Conditioning({}, 0)


@pytest.mark.parametrize("batch", [1, 3])
def test_save_and_load(tmp_path, batch: int) -> None:
    saved = _conditioning(batch)
    saved.save(tmp_path / "c.safetensors")
    loaded = Conditioning.load(tmp_path / "c.safetensors")
    assert loaded.batch_size == batch and _same(loaded.arguments(), saved.arguments())
    assert loaded.describe() == saved.describe()
    assert Conditioning.compatible(loaded, saved)


def test_save_refuses_what_json_cannot_hold(tmp_path) -> None:
    with pytest.raises(TypeError, match="a conditioning with a object cannot be saved"):
        Conditioning({"a": Leaf(object())}, 1).save(tmp_path / "c.safetensors")


def test_load_says_what_is_wrong(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no conditioning file"):
        Conditioning.load(tmp_path / "missing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="not a readable conditioning file"):
        Conditioning.load(tmp_path / "broken.safetensors")
