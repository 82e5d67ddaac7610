"""How conditions are divided among several students."""

from typing import Any

import pytest
import torch

from fewstep.conditioning.conditioning import Conditioning, Leaf
from fewstep.config.partition import PartitionWanted
from fewstep.data.partition import Part, part_of
from fewstep.errors import UserError


class Told:
    """Conditions of prompts that a network is told as vectors, beside what is alike for all of them."""

    kind = "prompt"

    def __init__(self, texts: torch.Tensor) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def items(self) -> list[str]:
        return [f"prompt {row}" for row in range(len(self))]

    def rows(self, items: list[str]) -> list[int] | None:
        known = {item: row for row, item in enumerate(self.items())}
        return [known[item] for item in items] if all(item in known for item in items) else None

    def one(self, row: int) -> Conditioning:
        words = torch.stack([self.texts[row] - 1, self.texts[row] + 1])[None]  # two tokens, whose mean is the text
        tree = {
            "words": Leaf(words, rows=1),
            "sizes": Leaf(torch.ones(1, 3), rows=1),
            "mask": Leaf(torch.ones(1, 2) > 0, 1),
        }
        return Conditioning(tree, 1)


def parts(conditions: Any, **wanted: Any) -> list[Part]:
    """Of every student."""
    count = wanted["students"]
    return [part_of(PartitionWanted(only=number, **wanted), conditions) for number in range(1, count + 1)]


def test_consecutive_parts_are_equal_and_leave_nothing_out() -> None:
    conditions = Told(torch.randn(10, 4, generator=torch.Generator().manual_seed(0)))
    found = parts(conditions, students=4, by="consecutive")
    assert [part.rows for part in found] == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    for part in found:
        assert part.places == ["words"]  # the sizes tell no prompt from another, and a mask is no number
        torch.testing.assert_close(torch.tensor(part.centroid), conditions.texts[part.rows].mean(0))
    assert found[1].note == "student 2 of 4; prompts of each: 2, 3, 2, 3"


def test_clusters_are_those_of_what_the_network_is_told() -> None:
    pytest.importorskip("scipy")
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[4.0, 0.0], [-4.0, 3.0], [0.0, -5.0]])
    of = torch.tensor([0, 2, 1, 1, 0, 0, 2, 0, 1, 0])
    conditions = Told(centres[of] + 0.3 * torch.randn(10, 2, generator=generator))
    found = parts(conditions, students=3, by="clusters", seed=5)
    assert sorted(part.rows for part in found) == [[0, 4, 5, 7, 9], [1, 6], [2, 3, 8]]
    assert [len(part.rows) for part in found] == [5, 3, 2]  # the largest first
    assert all(part.known == [] for part in found)  # the nearest centroid decides, for these prompts as for others
    centroids = torch.tensor([part.centroid for part in found])
    for number, part in enumerate(found):
        distances = torch.cdist(conditions.texts[part.rows], centroids)
        assert (distances.argmin(1) == number).all()


def test_prompts_that_are_told_alike() -> None:
    with pytest.raises(UserError, match="do not differ in what the network is told"):
        parts(Told(torch.zeros(4, 2)), students=2, by="consecutive")


def test_lists_of_prompts(tmp_path: Any) -> None:
    conditions = Told(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text("prompt 2\nprompt 0\n")
    files[1].write_text("prompt 1\n")
    found = parts(conditions, students=2, by="lists", lists=tuple(map(str, files)))
    assert [part.rows for part in found] == [[0, 2], [1]]
    files[1].write_text("prompt 1\nanother\n")
    with pytest.raises(UserError, match="has 'another', which is not among the run's prompts"):
        parts(conditions, students=2, by="lists", lists=tuple(map(str, files)))


def test_a_list_that_cannot_be_read_is_named_by_its_own_flag(tmp_path: Any) -> None:
    conditions = Told(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    (tmp_path / "one.txt").write_text("prompt 0\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for name in ("none.txt", "empty.txt", "bytes.txt"):
        lists = tuple(str(tmp_path / one) for one in ("one.txt", name))
        with pytest.raises(UserError, match=rf"--lists \S*{name}") as caught:
            parts(conditions, students=2, by="lists", lists=lists)
        assert "--prompts" not in str(caught.value)


def test_items_are_not_divided() -> None:
    conditions = Told(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    conditions.kind = "item"
    with pytest.raises(UserError, match="this teacher takes items: train one, with dmd2"):
        parts(conditions, students=2, by="consecutive")
