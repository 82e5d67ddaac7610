"""Items: what a teacher that looks at pictures is asked for, read from a file and refused where a row cannot be meant.

A row holds arguments of the pipeline's own call: its prompt, its pictures, and what else is one sample's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fewstep.conditioning.item import Item, digest, form_of, size_of
from fewstep.data.durable import json_sha256
from fewstep.data.item_columns import TARGET, Columns
from fewstep.data.item_pictures import SHOWN, Clip, Picture, flat, is_blank, is_mask
from fewstep.data.item_rows import Row, items_file, rows_of
from fewstep.errors import UserError
from fewstep.recording.sizes import with_mirrored

_LOOKED_AT = 1000  # rows, among which two that differ are looked for


class Arguments(Mapping[str, Any]):
    """The arguments of an item, of which pictures in files are opened when they are asked for.

    Args:
        as_read: the values, with what was seen of a picture in its place.
    """

    def __init__(self, as_read: Mapping[str, Any]) -> None:
        self.as_read = dict(as_read)

    def __getitem__(self, name: str) -> Any:
        value = self.as_read[name]
        if isinstance(value, list):
            return [child.open() if isinstance(child, Picture) else child for child in value]
        return value.open() if isinstance(value, Picture) else value

    def __contains__(self, name: object) -> bool:
        return name in self.as_read  # by default it would be opened for that

    def __iter__(self) -> Iterator[str]:
        return iter(self.as_read)

    def __len__(self) -> int:
        return len(self.as_read)


@dataclass(frozen=True)
class Items:
    """The items of a run.

    Attributes:
        each: in their order.
        files: that their pictures were read from.
        name: where they came from, for messages.
        targets: the wanted result of each, a picture or the frames of a clip; none where the items have none.
    """

    each: list[Item]
    files: list[Path]
    name: str
    targets: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.each)

    @property
    def keys(self) -> list[str]:
        """What each of them holds, as digests."""
        return [item.key for item in self.each]

    @property
    def contents(self) -> list[str]:
        """The same with their targets: all that a run may have read of them."""
        return self.keys + [json_sha256(_known_by(target)) for target in self.targets]

    def two(self) -> list[Item]:
        """Two items of one form that differ in as much as any two do; where the first is alone, it and itself mirrored.

        How a teacher is called is learnt from them.

        Raises:
            UserError: no two rows have different pictures.
        """
        first, *rest = self.each[:_LOOKED_AT]
        alike = [item for item in rest if item.form == first.form]
        other = max(alike or rest, key=lambda item: differing(first, item), default=first)
        if rest and not alike:
            texts = {name: other.arguments[name] for name, value in other.form if value is None}
            mirrored = with_mirrored(first)
            other = Item({**mirrored.arguments, **texts}, mirrored.name)
        elif not differing(first, other):
            raise UserError(
                f"{self.name}: no two rows have different pictures, and only two such show what of a teacher follows "
                "its picture; add a row with others"
            )
        return [first, other]


def read_items(
    source: str | Path | Sequence[Item | Mapping[str, Any]],
    pipeline_class: type,
    call: Mapping[str, Any] | None = None,
    *,
    cached: bool = False,
    progress: bool = False,
) -> Items:
    """Read items, and look at every picture once.

    Args:
        source: a .jsonl or .parquet file, a folder with items.jsonl in it, or the items themselves, whose pictures are
            PIL images, tensors, arrays or paths.
        pipeline_class: whose call takes them.
        call: what is told of its arguments for all items.
        cached: a cache was made of them, when they were looked at; of every picture but results the bytes alone are
            read, which tell whether it is the same.
        progress: show how far it is, where that takes a while.

    Raises:
        UserError: a row cannot be meant, or a picture cannot be read; the row is named.
    """
    if isinstance(source, str | Path):
        path = items_file(source)
        rows, folder, name = list(rows_of(path)), path.parent, f"--items {source}"
    else:
        rows, folder, name = [_given(number, row) for number, row in enumerate(source, 1)], Path(), "the items"
    if not rows:
        raise UserError(f"{name} holds no item; write a row of the pipeline's arguments for each")
    columns = Columns(pipeline_class, call or {}, pixels=not cached)
    each: list[Item] = []
    targets: list[Any] = []  # beside their items: names may be equal
    for row in tqdm(rows, desc="look at the items", unit="item", delay=2, disable=not progress):
        values = columns.read(row, folder)
        targets.append(None if TARGET in columns.hints else values.pop(TARGET, None))
        if not cached:
            _refuse_misfitting(row.name, values)
        key = json_sha256({k: _known_by(v) for k, v in values.items()})
        each.append(Item(Arguments(values), row.name, key, form_of(values)))
    _refuse_unlike(each)
    wanted = [target is not None for target in targets]
    if len(set(wanted)) > 1:
        odd = wanted.index(not wanted[0])
        has = "has a" if wanted[odd] else "has no"
        raise UserError(f"{each[odd]} {has} {TARGET}, unlike {each[0]}: give every row one, or none")
    given = targets if wanted[0] else []
    shown = [*map(values_of, each), *given]
    seen = [one.source for one in _pictures(shown) if isinstance(one, Picture)]
    files = dict.fromkeys(getattr(source, "path", source) for source in seen)
    return Items(each, [file for file in files if isinstance(file, Path)], name, given)


def values_of(item: Item) -> dict[str, Any]:
    """An item's arguments as they were read: nothing is opened."""
    return item.arguments.as_read if isinstance(item.arguments, Arguments) else dict(item.arguments)


def known_by(items: Sequence[Any]) -> list[Any]:
    """Prompts and labels as they are, and items by their keys."""
    return [item.key if isinstance(item, Item) else item for item in items]


def differing(a: Item, b: Item) -> int:
    """In how many arguments two items differ, pictures before all others; 0 where no picture does."""
    one, other = values_of(a), values_of(b)
    unlike = [name for name in one.keys() & other.keys() if _known_by(one[name]) != _known_by(other[name])]
    shown = sum(bool(_pictures(one[name])) for name in unlike)
    return shown * len(one) + len(unlike) if shown else 0


def _given(number: int, row: Item | Mapping[str, Any]) -> Row:
    """An item that was handed over."""
    values = values_of(row) if isinstance(row, Item) else row
    if not isinstance(values, Mapping):
        raise UserError(f"item {number} is a {type(row).__name__}, and no table of a pipeline's arguments")
    name = (row.name if isinstance(row, Item) else "") or f"item {number}"
    return Row(name, {column: value for column, value in values.items() if value is not None})


def _refuse_misfitting(name: str, values: Mapping[str, Any]) -> None:
    """Refuse pictures of a row that do not fit each other: a mask of another size, or blank, clips of two lengths."""
    shown = {column: value for column, value in values.items() if _pictures(value)}
    others = {column: value for column, value in shown.items() if not is_mask(column)}
    for column in shown.keys() - others.keys():
        mask = _pictures(shown[column])
        if all(one.blank if isinstance(one, Picture) else is_blank(one) for one in mask):
            raise UserError(f"{name}: {column} is all black, so that nothing is repainted: white is what is")
        if others and not any(_sizes(mask) <= _sizes(value) for value in others.values()):
            theirs = ", ".join(f"{other} {_in_words(value)}" for other, value in others.items())
            raise UserError(f"{name}: {column} has {_in_words(mask)}, and {theirs}: give it the size of its picture")
    lengths = {column: len(value) for column, value in shown.items() if _is_clip(column, value)}
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{column} has {count}" for column, count in lengths.items())
        raise UserError(f"{name}: its clips are of unequal lengths: {each} frames")


def _refuse_unlike(items: Sequence[Item]) -> None:
    """Refuse rows that do not belong together: with other arguments than the first, or clips of another length."""
    first = items[0]
    for item in items[1:]:
        if odd := sorted(item.arguments.keys() ^ first.arguments.keys()):
            has = "has" if odd[0] in item.arguments else "has no"
            raise UserError(f"{item.name} {has} {odd[0]}, unlike {first.name}: give every row the same arguments")
        for column, value in values_of(item).items():
            there = values_of(first)[column]
            if _is_clip(column, value) and _is_clip(column, there) and len(value) != len(there):
                raise UserError(
                    f"{item.name}: {column} has {len(value)} frames, and that of {first.name} has {len(there)}: "
                    "give clips of one length"
                )


def _is_clip(column: str, value: Any) -> bool:
    return isinstance(value, Clip) or (isinstance(value, list) and "video" in column)


def _pictures(value: Any) -> list[Any]:
    """All pictures in a value, or in a table or list of values."""
    if isinstance(value, dict):
        return [one for child in value.values() for one in _pictures(child)]
    if isinstance(value, list):
        return [one for child in value for one in _pictures(child)]
    return [value] if isinstance(value, SHOWN) else []


def _sizes(value: Any) -> set[tuple[int, int]]:
    return {size_of(one) for one in flat(value)}


def _in_words(value: Any) -> str:
    counted = Counter("x".join(map(str, size_of(one))) for one in flat(value))
    return ", ".join(text if count == 1 else f"{count} of {text}" for text, count in counted.items()) + " pixels"


def _known_by(value: Any) -> Any:
    """What a value is known by: what is written in its row, and of a picture its content."""
    if isinstance(value, list):
        return [_known_by(child) for child in value]
    if isinstance(value, Picture):
        return {"sha256": value.sha256}
    return {"content": digest({"": value})} if isinstance(value, SHOWN) else value
