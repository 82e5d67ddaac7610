"""Exported folders, read back as the benchmarks' own readers do it."""

from __future__ import annotations

import csv
import errno
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.errors import UserError
from fewstep.eval.exporters import EXPORTERS, Sample, export, read_items

SIDE = 8
RECORDS = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of  two cats"},
]
PROMPTS = [str(record["prompt"]) for record in RECORDS]


def colour(index: int) -> tuple[int, int, int]:
    return (index * 7 % 256, index * 31 % 256, 200)


def image(index: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    return Image.new("RGB", size, colour(index))


def samples(number: int, prompts: list[str] = PROMPTS) -> Iterator[Sample]:
    """Samples that cycle through the prompts, as an evaluation makes them."""
    return (Sample(i, prompts[i % len(prompts)], image(i)) for i in range(number))


def seen(picture: Image.Image) -> tuple[int, int, int]:
    """The one colour of a picture."""
    ((_, found),) = picture.convert("RGB").getcolors()
    return found


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """Each benchmark's own file of prompts."""
    folder = tmp_path / "benchmarks"
    (folder / "dpg").mkdir(parents=True)
    (folder / "geneval").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    atoms = [{"prompt": p, "atom_count": 1, "vqa_list": [["A cat?", "Yes"]], "skills": ["object"]} for p in PROMPTS]
    (folder / "geneval2").write_text("\n".join(json.dumps(record) for record in atoms))
    for name, prompt in zip(("12", "coco7", "whoops3"), PROMPTS):
        (folder / "dpg" / f"{name}.txt").write_text(prompt + "\n")
    with (folder / "oneig").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["category", "id", "prompt_en", "class"])
        rows.writerows(
            [
                [c, i, p, ""]
                for c, i, p in zip(("Portrait", "Portrait", "Text_Rendering"), ("000", "001", "000"), PROMPTS)
            ]
        )
    (folder / "imagereward").write_text(json.dumps([{"id": f"00{i}-7", "prompt": p} for i, p in enumerate(PROMPTS)]))
    return folder


def test_geneval(benchmark: Path, tmp_path: Path) -> None:
    """A folder of digits for each prompt, its line as JSON, PNGs whose names are digits."""
    done = export("geneval", samples(7), tmp_path / "out", benchmark / "geneval")
    found = {}
    for folder in (tmp_path / "out").iterdir():
        assert folder.name.isdigit()
        record = json.loads((folder / "metadata.jsonl").read_text())
        pictures = sorted((folder / "samples").iterdir())
        assert all(re.match(r"\d+\.png", path.name) for path in pictures)
        found[record["prompt"]] = (record, [seen(Image.open(path)) for path in pictures])
    expected = {
        prompt: (record, [colour(i) for i in range(7) if i % 3 == place])
        for place, (prompt, record) in enumerate(zip(PROMPTS, RECORDS))
    }
    assert found == expected
    assert (done.samples, done.notes) == (7, ())


def test_geneval2(benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table from the prompts, in the benchmark's own white space, to the paths of pictures."""
    spaced = [" ".join(prompt.split()) for prompt in PROMPTS]
    monkeypatch.chdir(tmp_path)
    done = export("geneval2", samples(5, spaced), Path("out"), benchmark / "geneval2")
    paths = json.loads((tmp_path / "out" / "image_paths.json").read_text())
    assert {prompt: seen(Image.open(path)) for prompt, path in paths.items()} == {
        p: colour(i) for i, p in enumerate(PROMPTS)
    }
    assert all(Path(path).is_absolute() for path in paths.values())
    assert done.notes == ("of up to 2 samples of a prompt GenEval 2 takes the first",)


@pytest.mark.parametrize(("each", "shape"), [(1, (1, 1)), (2, (2, 1)), (3, (2, 2)), (4, (2, 2))])
def test_dpg(each: int, shape: tuple[int, int], benchmark: Path, tmp_path: Path) -> None:
    """One file for each item, out of which squares are cut in a fixed order."""
    done = export("dpg", samples(3 * each), tmp_path / "out", benchmark / "dpg")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["12.png", "coco7.png", "whoops3.png"]
    for place, name in enumerate(("12", "coco7", "whoops3")):
        grid = Image.open(tmp_path / "out" / f"{name}.png")
        assert grid.size == (shape[0] * SIDE, shape[1] * SIDE)
        corners = [(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)][:each]
        cut = [seen(grid.crop((x, y, x + SIDE, y + SIDE))) for x, y in corners]
        assert cut == [colour(place + 3 * number) for number in range(each)]
    assert done.command.endswith(f"--resolution {SIDE} --pic-num {each}")


def test_dpg_takes_its_table_of_questions_too(benchmark: Path) -> None:
    table = benchmark / "dpg_bench.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item_id", "text", "proposition_id", "question_natural_language"])
        rows.writerows(
            [["12", PROMPTS[0], 1, "A cat?"], ["12", PROMPTS[0], 2, "One?"], ["coco7", "two, with a comma", 1, "?"]]
        )
    assert [(item.key, item.prompt) for item in read_items("dpg", table)] == [
        ("12", PROMPTS[0]),
        ("coco7", "two, with a comma"),
    ]


@pytest.mark.parametrize(("number", "side"), [(3, 1), (12, 2), (7, 2), (15, 2)])
def test_oneig(number: int, side: int, benchmark: Path, tmp_path: Path) -> None:
    """A picture for each id in the folder of its class and model, cut into side x side; black ones do not count."""
    done = export("oneig", samples(number), tmp_path / "out", benchmark / "oneig", model="student")
    for place, path in enumerate(("human/student/000", "human/student/001", "text/student/000")):
        grid = Image.open(tmp_path / "out" / "images" / f"{path}.webp")
        width, height = grid.size[0] // side, grid.size[1] // side
        boxes = [(x * width, y * height, (x + 1) * width, (y + 1) * height) for y in range(side) for x in range(side)]
        cut = [colour_ for box in boxes if (colour_ := seen(grid.crop(box))) != (0, 0, 0)]
        assert cut == [colour(i) for i in range(number) if i % 3 == place][: side * side]
        assert (width, height) == (SIDE, SIDE)
    assert done.command.endswith(f"--model_names student --image_grid {side}")
    assert len(done.notes) == (number > 12)


def test_imagereward(benchmark: Path, tmp_path: Path) -> None:
    """Equally many pictures for each prompt of the list, named by its id."""
    done = export("imagereward", samples(8), tmp_path / "out", benchmark / "imagereward", model="student")
    items = json.loads((tmp_path / "out" / "prompts.json").read_text())
    pictures = tmp_path / "out" / "generations" / "student"
    for place, item in enumerate(items):
        paths = [pictures / f"{item['id']}_{x}.png" for x in range(len(list(pictures.iterdir())) // len(items))]
        assert [seen(Image.open(path)) for path in paths] == [colour(place), colour(place + 3)]
    assert [(item["id"], item["prompt"]) for item in items] == [(f"00{i}-7", p) for i, p in enumerate(PROMPTS)]
    assert done.notes == ("2 samples beyond 2 for each prompt are left out",)


def test_imagereward_leaves_out_what_would_be_counted_for_others(benchmark: Path, tmp_path: Path) -> None:
    """Of five, one and one the reader would want two for each, and look for files that are not there."""
    some = [Sample(i, PROMPTS[max(i - 4, 0)], image(i)) for i in range(7)]
    export("imagereward", some, tmp_path / "out", benchmark / "imagereward")
    names = {path.name for path in (tmp_path / "out" / "generations" / "fewstep").iterdir()}
    assert names == {"000-7_0.png", "001-7_0.png", "002-7_0.png"}


def test_imagereward_takes_own_prompts(tmp_path: Path) -> None:
    export("imagereward", samples(4, ["mine", "yours"]), tmp_path / "out")
    items = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert items == [{"id": "00000", "prompt": "mine"}, {"id": "00001", "prompt": "yours"}]
    assert len(list((tmp_path / "out" / "generations" / "fewstep").iterdir())) == 4


def test_hpsv3(tmp_path: Path) -> None:
    """A prompt's file beside each picture."""
    export("hpsv3", samples(4, ["mine, Ü", "yours"]), tmp_path / "out", model="student")
    pictures = sorted((tmp_path / "out" / "student").glob("*.png"))
    found = [(seen(Image.open(p)), Path(str(p)[:-4] + ".txt").read_text("utf-8")) for p in pictures]
    assert found == [(colour(i), ("mine, Ü", "yours")[i % 2]) for i in range(4)]


def test_adm(tmp_path: Path) -> None:
    """numpy's archive, and the way in which the evaluator reads it in parts."""
    done = export("adm", (Sample(i, None, image(i, (6, 5))) for i in range(3)), tmp_path / "out")
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "samples_3x5x6x3.npz"
    array = np.load(path, allow_pickle=False)["arr_0"]
    assert (array.dtype, array.shape) == (np.uint8, (3, 5, 6, 3))
    assert [tuple(picture[2, 3]) for picture in array] == [colour(i) for i in range(3)]
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as entry:
        assert np.lib.format.read_magic(entry) == (1, 0)
        assert np.lib.format.read_array_header_1_0(entry) == ((3, 5, 6, 3), False, np.dtype(np.uint8))
        assert entry.read(5 * 6 * 3) == array[0].tobytes()
        assert archive.infolist()[0].compress_type == zipfile.ZIP_STORED
    assert done.samples == 3


def test_pictures_may_be_files(benchmark: Path, tmp_path: Path) -> None:
    """A PNG in RGB is copied to the byte; everything else becomes one."""
    Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 4)).save(tmp_path / "alpha.png")
    image(5).save(tmp_path / "plain.png", compress_level=9)
    Image.new("L", (SIDE, SIDE), 9).save(tmp_path / "grey.bmp")
    files = [tmp_path / name for name in ("alpha.png", "plain.png", "grey.bmp")]
    export(
        "geneval",
        (Sample(i, p, f) for i, (p, f) in enumerate(zip(PROMPTS, files))),
        tmp_path / "out",
        benchmark / "geneval",
    )
    written = [tmp_path / "out" / f"0000{i}" / "samples" / "00000.png" for i in range(3)]
    assert [seen(Image.open(path)) for path in written] == [(1, 2, 3), colour(5), (9, 9, 9)]
    assert [Image.open(path).mode for path in written] == ["RGB"] * 3
    assert written[1].read_bytes() == files[1].read_bytes()


def test_a_prompt_that_is_there_twice_gets_samples_in_turn(benchmark: Path, tmp_path: Path) -> None:
    (benchmark / "geneval").write_text("\n".join(json.dumps(RECORDS[0]) for _ in range(2)))
    export("geneval", samples(4, PROMPTS[:1]), tmp_path / "out", benchmark / "geneval")
    assert [len(list((tmp_path / "out" / f"0000{i}" / "samples").iterdir())) for i in range(2)] == [2, 2]


@pytest.mark.parametrize("kind", ["geneval", "geneval2", "dpg", "oneig", "imagereward"])
def test_prompts_without_samples_are_said(kind: str, benchmark: Path, tmp_path: Path) -> None:
    done = export(kind, samples(2, PROMPTS[:2]), tmp_path / "out", benchmark / kind)
    assert "1 of the benchmark's 3 prompts have no sample: its score is of the others" in done.notes


# --- what is refused ----------------------------------------------------------------------------------------------


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize("kind", EXPORTERS)
def test_without_samples_nothing_is_left(kind: str, benchmark: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no sample to export"):
        export(kind, iter(()), tmp_path / "out", benchmark / kind)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "some", "said"),
    [
        ("geneval", [Sample(0, "something else", image(0))], "has no prompt 'something else'"),
        ("geneval", [Sample(0, None, image(0))], "sample 0 has no prompt"),
        ("dpg", [Sample(i, PROMPTS[i // 2], image(i)) for i in range(3)], "coco7 has 1, others have 2"),
        ("dpg", [Sample(0, PROMPTS[0], image(0, (8, 9)))], "8 x 9 pixels"),
        ("oneig", [Sample(i, PROMPTS[i], image(i, (8, 8 + i))) for i in range(2)], "8 x 8, 8 x 9"),
        ("adm", [Sample(i, None, image(i, (8, 8 + i))) for i in range(2)], "sample 1 has 8 x 9 pixels, not 8 x 8"),
        ("geneval", [Sample(7, PROMPTS[0], Path("nowhere.png"))], "the picture of sample 7 cannot be read"),
    ],
    ids=["another prompt", "no prompt", "too few", "no square", "two sizes", "two sizes in one array", "no file"],
)
def test_what_does_not_fit_is_one_sentence(
    kind: str, some: list[Sample], said: str, benchmark: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        export(kind, some, tmp_path / "out", benchmark / kind)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert left(tmp_path) == []


def test_a_folder_that_is_taken_stays_as_it_is(benchmark: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export("geneval", samples(3), tmp_path / "out", benchmark / "geneval")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    assert export("geneval", samples(3), tmp_path / "out", benchmark / "geneval").samples == 3


def test_a_full_disk_leaves_nothing(benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        export("geneval", samples(3), tmp_path / "out", benchmark / "geneval")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("geneval", "no json", "does not hold the prompts of geneval"),
        ("geneval", '{"prompt": 3, "tag": "x"}', "prompt 1: its prompt is no text"),
        ("geneval2", json.dumps(RECORDS[0]), "it has no vqa_list"),
        ("geneval", "\n", "holds no prompt"),
        ("oneig", "category,id\nPortrait,000\n", "no column prompt_en or prompt_cn"),
        ("oneig", "category,id,prompt_en\nNew,000,x\n", "'New' has no folder"),
        ("oneig", "category,id,prompt_en\nPortrait,../x,x\n", "can be no file's name"),
        ("oneig", "category,id,prompt_en\nPortrait,0,x\nPortrait,0,y\n", "has human/0 2 times"),
        ("oneig", "category,id,prompt_en\nPortrait,0\n", "another number of columns"),
        ("dpg", "id,text\n1,x\n", "no column item_id"),
        ("imagereward", '{"id": "1"}', "it is no list"),
    ],
)
def test_another_file_of_prompts_is_refused(kind: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text(text)
    with pytest.raises(UserError) as error:
        read_items(kind, tmp_path / "prompts")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_kinds_names_and_files_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are geneval, geneval2, dpg, oneig, imagereward, hpsv3, adm"):
        export("geneval3", samples(1), tmp_path / "out")
    with pytest.raises(UserError, match="give the file of its prompts"):
        export("geneval", samples(1), tmp_path / "out")
    with pytest.raises(UserError, match="cannot be read"):
        export("geneval", samples(1), tmp_path / "out", tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be a folder's name"):
        export("hpsv3", samples(1), tmp_path / "out", model="../x")
    with pytest.raises(UserError, match="no prompts belong to 'adm'"):
        read_items("adm", tmp_path)


def test_the_page_of_benchmarks_has_every_kind() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.M) == list(EXPORTERS)
