"""The page of a report: whole in itself, nobody's text runs in it, charts can be read, and the slider slides."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import Browser, chromium
from PIL import Image
from toy_reports import MEASURES, ROWS, row, toy_report, with_pictures

from fewstep.eval.report import Report
from fewstep.eval.report.chart import BOTTOM, LEFT, WIDTH, Chart, charts
from fewstep.eval.report.embedded import BUDGET, embed
from fewstep.eval.report.page import page
from fewstep.eval.report.pictures import write_pictures

EVIL = "\"><img src=x onerror=a(1)><script>a(2)</script>' {{ 7*7 }} </style>&"


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    return reader


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a toy report with pictures."""
    out = tmp_path_factory.mktemp("page")
    with_pictures(toy_report(), out).save(out)
    return out / "report.html"


def test_the_page_needs_nothing_but_itself(shown: Path) -> None:
    text = shown.read_text(encoding="utf-8")
    reader = read(text)
    for tag, attributes in reader.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?://", text)
    pictures = [attributes for tag, attributes in reader.tags if tag == "img" and attributes.get("src")]
    assert "The pictures take 0.1 of at most 12 MiB in this file." in reader.text
    assert len(pictures) == 12 and pictures[5]["alt"] == "teacher, 25 steps: two cups of tea"
    for said in (*toy_report().headlines(), *toy_report().notes, *toy_report().skipped):
        assert said in reader.text


def test_the_policy_admits_the_pages_own_script_and_style_alone(shown: Path) -> None:
    text = shown.read_text(encoding="utf-8")
    policy = next(a["content"] for _, a in read(text).tags if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag in ("script", "style"):
        ((content,),) = [re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)]
        assert rules[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def evil_report() -> Report:
    """In which every text is an attack, and in which no word is one."""
    numbers = (5.0, 0.2, 100.0, 0.3, 0.5, 10.0)
    measures = {
        name: type(measure)(**{**measure.__dict__, "title": EVIL, "floor_of": EVIL})
        for name, measure in MEASURES.items()
    }
    return toy_report(
        rows=[row("student", 4, numbers, model=EVIL), row("teacher", 4, numbers, model=EVIL)],
        measures=measures,
        conditions={"kind": "prompt", "shown": [EVIL] * 3},
        notes=[EVIL],
        skipped=[EVIL],
        versions={EVIL: EVIL},
    )


def test_a_strangers_text_is_shown_as_text(tmp_path: Path) -> None:
    """Names of models and of measures, prompts, notes and versions: the same elements as on a harmless page."""
    evil, harmless = with_pictures(evil_report(), tmp_path), with_pictures(evil_report(), tmp_path)
    for each in harmless.rows:
        each["model"] = "x"
    reader, other = read(page(evil, tmp_path)), read(page(harmless, tmp_path))
    assert {tag for tag, _ in reader.tags} == {tag for tag, _ in other.tags}
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert [tag for tag, _ in reader.tags].count("style") == 1
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert reader.text.count(EVIL) > 10 and "49" not in reader.text
    assert any(attributes.get("alt", "") == f"{EVIL}, 4 steps: {EVIL}" for _, attributes in reader.tags)


def test_long_texts_are_cut(tmp_path: Path) -> None:
    long = "x" * 10**6
    text = page(toy_report(notes=[long], conditions={"kind": "prompt", "shown": [long]}), tmp_path)
    assert len(text) < 100_000


def test_without_pictures_and_numbers_there_is_a_page(tmp_path: Path) -> None:
    bare = [{**row("student", 4, (0.0,) * 5 + (1.0,)), "metrics": {}, "spread": {}, "speed": None}]
    text = page(toy_report(rows=bare), tmp_path)
    assert "<svg" not in text and 'id="compare"' not in text and "student" in text


# --- pictures ---------------------------------------------------------------------------------------------------


def test_pictures_fit_a_budget_and_say_what_was_lost(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (4, 3, 300, 200), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows = [write_pictures(tmp_path, name, noise) for name in ("a", "b")]
    for budget, side, columns in ((BUDGET, 300, 4), (400_000, 192, 4), (60_000, 64, 4), (30_000, 64, 2)):
        made = embed(tmp_path, rows, budget)
        pictures = [picture for line in made.rows for picture in line if picture is not None]
        assert sum(len(picture.uri) for picture in pictures) <= budget
        assert made.columns == columns and {max(picture.width, picture.height) for picture in pictures} == {side}
        assert any("reduced" in note for note in made.notes)
        assert any(f"Only the first {columns} of 4" in note for note in made.notes) == (columns < 4)
    nothing = embed(tmp_path, rows, 10)
    assert nothing.columns == 0 and "Only the first 0 of 4 pictures" in nothing.notes[-1]


def test_small_pictures_are_kept_to_the_pixel(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    made = embed(tmp_path, [write_pictures(tmp_path, "a", images)])
    assert made.notes == [] and made.rows[0][1] is not None and made.rows[0][1].small
    (tmp_path / "again.png").write_bytes(base64.b64decode(made.rows[0][1].uri.partition(",")[2]))
    with Image.open(tmp_path / "again.png") as again:
        assert list(again.getdata()) == images[1].flatten().tolist()


def test_videos_are_contact_sheets(tmp_path: Path) -> None:
    (name,) = write_pictures(tmp_path, "a", torch.zeros(1, 3, 3, 8, 8, dtype=torch.uint8))
    with Image.open(tmp_path / name) as sheet:
        assert sheet.width > 3 * 8 and sheet.height == 8
    ((sheet_shown,),) = embed(tmp_path, [[name]]).rows
    assert sheet_shown is not None and sheet_shown.wide and sheet_shown.small


def test_pictures_that_cannot_be_read_are_missed(tmp_path: Path) -> None:
    """And nothing outside the folder is read, by a link neither."""
    folder = tmp_path / "report"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "text.png").write_text("no picture")
    made = embed(folder, [["link.png", "text.png", "absent.png"]])
    assert made.rows == [[None, None, None]] and made.notes == ["3 pictures are missing, such as link.png."]


# --- charts -----------------------------------------------------------------------------------------------------


def labels(chart: Chart) -> list[tuple[float, float, float, float]]:
    placed = [point.label for one in chart.series for point in one.points if point.label is not None]
    return [label.box for label in placed] + ([chart.floor_label.box] if chart.floor_label else [])


def test_a_chart_by_hand() -> None:
    by_calls, by_latency = charts(toy_report(), "fid")
    assert by_calls.title == "FID against network evaluations per sample"
    assert by_latency.x_title == "latency of one sample, ms"
    teacher, student = by_calls.series
    assert [one.name for one in (teacher, student)] == ["teacher", "student"]
    assert [point.label and point.label.text for point in teacher.points] == ["4", "25"]
    # Cost grows to the right and quality falls downwards; the floor is the lowest.
    assert teacher.points[0].x < teacher.points[1].x and teacher.points[0].y < teacher.points[1].y
    assert by_calls.floor is not None and max(p.y for s in by_calls.series for p in s.points) < by_calls.floor < BOTTOM
    # 4 of the student's and 8 of the teacher's calls are as far from each other as 25 and 50 would be.
    ticks = {label.text: label.x for label in by_calls.x_ticks}
    assert ticks["2"] - ticks["1"] == pytest.approx(ticks["20"] - ticks["10"], abs=0.3)
    assert student.points[1].about == "student, 4 steps: FID 5.00 ±0.25 at 4 network evaluations per sample"
    assert student.points[1].bar is not None
    assert student.points[1].bar[0] > student.points[1].y > student.points[1].bar[1]


def test_labels_cover_nothing() -> None:
    """With twenty rows in a small place: labels that find no room are left to the mark's own words."""
    crowd = [
        row("student", steps, (5.0 + 0.2 * k, 0.1, 100.0, 0.3, 0.5, 10.0 * steps), model=f"student {k}")
        for k in range(5)
        for steps in (1, 2, 3, 4)
    ]
    for chart in itertools.chain(charts(toy_report(), "fid"), charts(toy_report(rows=crowd), "fid")):
        boxes = labels(chart)
        assert len(boxes) >= 4
        for left, top, right, bottom in boxes:
            assert left >= LEFT and right <= WIDTH and top >= 0 and bottom <= BOTTOM
            for one in chart.series:
                assert not any(left < p.x < right and top < p.y < bottom for p in one.points)
        for (l, t, r, b), (x, y, u, v) in itertools.combinations(boxes, 2):  # noqa: E741
            assert r <= x or u <= l or b <= y or v <= t


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-1e-3, 2e-3], [1e-9, 1e9], [1e300], [0.301, 0.302]])
def test_a_chart_of_any_numbers(values: list[float]) -> None:
    rows = [row("student", k + 1, (value, 0.0, 1.0, 0.3, 0.5, 1.0)) for k, value in enumerate(values)]
    for chart in charts(toy_report(rows=rows), "fid"):
        assert 1 <= len(chart.y_ticks) <= 8 and 1 <= len(chart.x_ticks) <= 8
        assert all(0 <= point.y <= BOTTOM for one in chart.series for point in one.points)


# --- in a browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip("no Chromium is installed")
    try:
        browser = Browser(program, tmp_path_factory.mktemp("profile"))
    except OSError as error:  # a stand-in for a package that is not installed, or a machine that lets none start
        pytest.skip(f"{program} does not start: {error}")
    yield browser
    browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_the_page_in_a_browser(browser: Browser, shown: Path, width: int, scheme: str) -> None:
    browser.open(shown, width, scheme=scheme)
    assert browser.troubles() == []
    assert {url.partition(":")[0] for url in browser.requests()} <= {"file", "data"}
    assert len([url for url in browser.requests() if url.startswith("file:")]) == 1
    # Nothing stands out of the page: wide tables scroll in themselves.
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("[...document.images].filter(i => i.src).every(i => i.complete && i.naturalWidth === 64)")
    heights = browser.run("[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)")
    legible = [height for height in heights if height > 0]  # the others belong to numbers that were not chosen
    assert len(legible) > 20 and min(legible) >= 11
    dark = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", dark)[:3])) < 60) == (scheme == "dark")


def test_the_slider_slides(browser: Browser, shown: Path) -> None:
    """By the keyboard and by the mouse; the pictures are those of the chosen rows and sample."""
    browser.open(shown, 1280)
    cut = "document.getElementById('cut')"
    clip = "getComputedStyle(document.getElementById('over')).clipPath"
    assert browser.run(clip) == "inset(0px 0px 0px 50%)"
    browser.run(f"{cut}.focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.run(clip) == "inset(0px 0px 0px 52%)"
    assert browser.run(f"{cut}.getAttribute('aria-valuetext')") == (
        "52 percent teacher, 25 steps, the rest student, 4 steps"
    )
    browser.run(f"{cut}.scrollIntoView({{block: 'center'}})")
    left, top, width, height = browser.run(f"(r => [r.x, r.y, r.width, r.height])({cut}.getBoundingClientRect())")
    browser.click(left + 0.2 * width, top + height / 2)
    assert browser.run(f"Number({cut}.value)") == pytest.approx(20, abs=2)
    assert browser.run(clip) == f"inset(0px 0px 0px {browser.run(f'{cut}.value')}%)"

    browser.run("(s => {s.value = '2'; s.dispatchEvent(new Event('change'))})(document.getElementById('sample'))")
    browser.run("(s => {s.value = '0'; s.dispatchEvent(new Event('change'))})(document.getElementById('right'))")
    assert browser.run("document.getElementById('over').alt") == "teacher, 4 steps: two cups of tea"
    assert browser.run("document.getElementById('under').alt") == "teacher, 25 steps: two cups of tea"
    assert browser.run("document.getElementById('condition').textContent") == "two cups of tea"
    assert browser.troubles() == []


def test_a_heading_sorts_and_a_choice_changes_the_charts(browser: Browser, shown: Path) -> None:
    browser.open(shown, 1280)
    column = "[...document.querySelectorAll('#table tbody tr')].map(r => r.cells[3].textContent)"
    press = "document.querySelectorAll('#table thead button')[3].click()"
    unsorted = [f"{fid:.2f} ±{spread:.2f}" for _, _, fid, spread, *_ in ROWS]
    assert browser.run(column) == unsorted
    browser.run(press)
    assert browser.run(column) == [unsorted[k] for k in (1, 3, 2, 0)]
    browser.run(press)
    assert browser.run(column) == [unsorted[k] for k in (0, 2, 3, 1)]
    assert browser.run("document.querySelectorAll('#table [aria-sort]').length") == 1
    visible = "[...document.querySelectorAll('[data-measure]')].map(p => p.checkVisibility())"
    assert browser.run(visible) == [True, False, False]
    browser.run("(s => {s.value = '2'; s.dispatchEvent(new Event('change'))})(document.getElementById('measure'))")
    assert browser.run(visible) == [False, False, True]


def test_attacks_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    with_pictures(evil_report(), tmp_path).save(tmp_path)
    browser.open(tmp_path / "report.html", 800)
    assert browser.troubles() == [] and len(browser.requests()) >= 1
    assert {url.partition(":")[0] for url in browser.requests()} <= {"file", "data"}
    assert browser.run("document.scripts.length") == 1 and browser.run("document.images.length") == 8
