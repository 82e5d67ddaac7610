"""Conditions divided among several students: consecutive ones, lists of labels or prompts, clusters of prompts."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.config.partition import PartitionWanted
from fewstep.data.conditions import Conditions, read_classes, read_prompts
from fewstep.errors import UserError

_WHOLE_RUNS_FLAG = re.compile(r"--(classes|data|prompts)\b")


@dataclass(frozen=True)
class Part:
    """One student's share of a run's conditions, and what a router has to know of it.

    Attributes:
        number: of the student, from 1.
        of: how many students there are.
        rows: numbers of its conditions among the run's.
        note: one line: how many conditions each student has.
        known: its labels, or its prompts as a router knows them; none where clusters decide.
        places: where in the network's arguments the tensors lie whose means tell prompts apart; none of labels.
        centroid: the mean of its prompts there (D,).
    """

    number: int
    of: int
    rows: list[int]
    note: str
    known: list[str]
    places: list[str]
    centroid: list[float]

    def about(self) -> dict[str, Any]:
        """For a student's ``fewstep.json``."""
        return {name: getattr(self, name) for name in ("number", "of", "known", "places", "centroid")}


def part_of(wanted: PartitionWanted, conditions: Conditions) -> Part:
    """The share of the student that is trained, the first one's where all are.

    Raises:
        UserError: the conditions cannot be divided so.
    """
    if conditions.kind is None:
        raise UserError("this teacher is conditioned on nothing, so that there is nothing to divide among students")
    if conditions.kind == "item":
        raise UserError(
            "students that share the work are chosen by a prompt or a label, and this teacher takes items: train one, "
            "with dmd2"
        )
    if len(conditions) < wanted.students:
        count, kind = len(conditions), conditions.kind
        raise UserError(f"{count} {kind}{'s' * (count != 1)} are too few for --students {wanted.students}")
    means, places = _means(conditions) if conditions.kind == "prompt" else (torch.zeros(len(conditions), 0), [])
    if wanted.by == "clusters":
        if conditions.kind != "prompt":
            raise UserError("--partition clusters divides prompts, and this teacher takes labels: take consecutive")
        groups = _clusters(means, wanted.students, wanted.seed)
    elif wanted.by == "lists":
        groups = _listed(conditions, wanted.lists)
    else:
        bounds = [len(conditions) * k // wanted.students for k in range(wanted.students + 1)]
        groups = [list(range(low, high)) for low, high in pairwise(bounds)]
    number = wanted.only or 1
    rows = groups[number - 1]
    sizes = ", ".join(f"{len(group):,}" for group in groups)
    note = f"student {number} of {len(groups)}; {conditions.kind}s of each: {sizes}"
    items, router = conditions.items(), _router()
    known = [router.known_as(items[row]) if conditions.kind == "prompt" else str(items[row]) for row in rows]
    centroid: list[float] = means[rows].mean(0).tolist()
    return Part(number, len(groups), rows, note, [] if wanted.by == "clusters" else known, places, centroid)


def _means(conditions: Conditions) -> tuple[Tensor, list[str]]:
    """What the network is told for each prompt, as means (N, D), and the places that these are of.

    What is alike for all prompts (position ids, sizes) tells none of them apart, and is left out.
    """
    found: list[dict[str, Tensor]] = []
    for row in range(len(conditions)):
        found.append(_router().place_means(conditions.one(row).arguments()))
    first = found[0]
    everywhere = [name for name, value in first.items() if all(_of_shape(one.get(name), value) for one in found)]
    places = [name for name in everywhere if any(not torch.equal(one[name], first[name]) for one in found)]
    if not places:
        raise UserError("these prompts do not differ in what the network is told, so that they cannot be divided")
    return torch.stack([torch.cat([one[name] for name in places]) for one in found]), places


def _of_shape(value: Tensor | None, other: Tensor) -> bool:
    return value is not None and value.shape == other.shape


def _clusters(means: Tensor, count: int, seed: int) -> list[list[int]]:
    """k-means of (N, D); the largest cluster first."""
    try:
        from scipy.cluster.vq import ClusterError, kmeans2
    except ImportError as error:
        raise UserError(
            "--partition clusters needs scipy: pip install 'fewstep[clusters]', or take --partition consecutive"
        ) from error
    try:
        _, labels = kmeans2(means.double().numpy(), count, iter=100, minit="++", missing="raise", seed=seed)
    except ClusterError as error:
        raise UserError(f"these prompts do not fall into {count} clusters; give fewer --students") from error
    groups = [[row for row, label in enumerate(labels) if label == k] for k in range(count)]
    return sorted(groups, key=lambda group: (-len(group), group[0]))


def _listed(conditions: Conditions, lists: Sequence[str]) -> list[list[int]]:
    """The rows of each list's labels or prompts, all of which together are the run's."""
    of_labels = conditions.kind == "label"
    items: list[list[Any]] = []
    for source in lists:
        try:
            items.append([*(read_classes(source) if of_labels else read_prompts(source))])
        except UserError as error:  # which names the flag of the whole run
            raise UserError(_WHOLE_RUNS_FLAG.sub("--lists", str(error))) from error
    groups = []
    for name, one in zip(lists, items, strict=True):
        rows = conditions.rows(one)
        if rows is None:
            other = next(item for item in one if conditions.rows([item]) is None)
            raise UserError(f"--lists {name} has {other!r}, which is not among the run's {conditions.kind}s")
        groups.append(sorted(set(rows)))
    counts = Counter(row for group in groups for row in group)
    for row, item in enumerate(conditions.items()):
        # Of items that are there twice, one row stands for all.
        own = conditions.rows([item])
        if own == [row] and counts[row] != 1:
            raise UserError(f"--lists must have each {conditions.kind} once, and {item!r} is there {counts[row]} times")
    return groups


def _router() -> Any:
    """The file that routes requests in a student's folder: what it knows prompts by is what they are divided by."""
    return importlib.import_module("fewstep.pipelines.multi_student")
