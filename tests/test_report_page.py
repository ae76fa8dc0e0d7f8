"""The report page: what is in the file, and, in a headless Chromium, everything that a person does with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import trimtab
from browser import NoBrowserError, open_browser
from pass_pipeline import build_transformer
from trimtab.errors import MissingDependencyError, PassError, TrimtabError
from trimtab.ir import Builder, DType, Graph, Module, TensorType, Weight, ops
from trimtab.ir.rewrite.log import NearMiss
from trimtab.passes.base import Context, Pass
from trimtab.passes.contracts import Contract, Exact, Lossy
from trimtab.passes.pipeline import Pipeline, load_group
from trimtab.report import ReportRecorder, render_page, write_page

F32 = DType.F32
HOSTILE = """</script><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>&amp;'\\"\u2028"""


@dataclass(frozen=True)
class NearMisses(Pass):
    """Changes nothing and reports why."""

    name: ClassVar[str] = "near-misses"
    contract: ClassVar[Contract] = Exact()

    def run(self, module: Module, ctx: Context) -> bool:
        log = ctx.rewrites.of("gelu-erf")
        op = next(op for op in module.main.ops if op.name == "erf")
        log.tried = 4
        log.reject(NearMiss(3, 5, repr(op), "model.py:7", "the constant is 1.5, not sqrt(2)"))
        ctx.note("nothing was raised")
        ctx.record({"layer": HOSTILE, "scheme": "W8A8", "sqnr_db": 31.4159, "clipped": float("nan")})
        return False


@dataclass(frozen=True)
class Fails(Pass):
    """Changes the module and then raises."""

    name: ClassVar[str] = "fails"
    contract: ClassVar[Contract] = Lossy()

    def run(self, module: Module, ctx: Context) -> bool:
        softmax = next(op for op in module.main.ops if op.name == "softmax")
        relu = module.main.ops.insert_before(softmax, ops.Relu(softmax.operands[0]))
        softmax.set_operand(0, relu.result)
        raise PassError("the softmax is in the way", values={"at": "softmax"}, rule="a test", fix="none")


def _hostile_module() -> Module:
    b = Builder()
    x = b.input(HOSTILE, TensorType(F32, (2, 4)))
    with b.at(trimtab.errors.Location(HOSTILE, 3, HOSTILE)):
        y = b(ops.Linear(x, b.weight(HOSTILE, torch.randn(4, 4))), HOSTILE)
    b.output(b(ops.Mul(y, b.scalar(1.0, F32))), names=[HOSTILE])
    return b.module


def _module_with_a_region() -> Module:
    b = Builder()
    x = b.input("x", TensorType(F32, (2, 4)))
    body = Graph("", [])
    inner = body.add_input(x.type, "carried")
    weight = b.module.add_weight(Weight.from_tensor("w", torch.randn(4, 4)))
    linear = body.ops.append(ops.Linear(inner, body.weight(weight)))
    body.set_outputs([linear.result])
    b.output(*b.add(ops.Repeat([x], [], [], body, n=3)).results)
    return b.module


def _recorded(module: Module, *passes: Any, title: str = "test") -> ReportRecorder:
    recorder = ReportRecorder(title)
    try:
        trimtab.optimize(module, Pipeline(passes), observers=[recorder], check="never")
    except TrimtabError as error:
        recorder.failed(error)
    return recorder


# -- the file -------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of those that hold only text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.attributes: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._open = tag
        self.attributes += [name for name, _ in attributes]
        self.texts.setdefault(tag, []).append("")

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "title"):
            self.texts[self._open][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def test_the_page_is_one_file_that_asks_for_nothing() -> None:
    recorder = _recorded(_hostile_module(), load_group("cleanup"), title=HOSTILE)
    page = render_page(recorder)
    found = Elements(page)
    assert {"src", "href", "onerror", "onclick"}.isdisjoint(found.attributes)
    assert "img" not in found.texts
    assert found.texts["title"] == [HOSTILE]
    data, *scripts = found.texts["script"]  # then d3, dagre and ours
    assert json.loads(data)["title"] == HOSTILE
    assert len(scripts) == 3
    assert "default-src &#x27;none&#x27;" in page


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = _recorded(_hostile_module(), load_group("cleanup"))
    monkeypatch.setattr("trimtab.report.page._LIBRARIES", {"xstatic.pkg.nothing": "nothing.js"})
    with pytest.raises(MissingDependencyError, match=r'pip install "trimtab\[report\]"'):
        write_page(tmp_path / "report.html", recorder)
    assert list(tmp_path.iterdir()) == []


# -- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        with open_browser() as opened:
            yield opened
    except NoBrowserError as error:
        pytest.skip(str(error))


class Window:
    """A report in the browser. Errors, warnings and requests of the page fail the test at the end."""

    def __init__(self, page: Any, path: Path, fragment: str = "") -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("request", lambda request: self._request(request.url))
        page.emulate_media(reduced_motion="reduce")  # no waiting for flights
        page.goto(f"{path.as_uri()}{fragment}")
        page.wait_for_function("window.report !== undefined")
        self.settle()

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _request(self, url: str) -> None:
        if not url.startswith("file:"):
            self.complaints.append(f"request: {url}")

    def settle(self) -> None:
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def js(self, expression: str) -> Any:
        return self.page.evaluate(expression)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def click(self, selector: str) -> None:
        self.page.click(selector)
        self.settle()

    def choose(self, index: int) -> None:
        """Choose an entry of the pipeline's list; 0 is the whole run."""
        self.page.locator(".step").nth(index).click()
        self.settle()

    def click_op(self, side: int, mnemonic: str) -> int:
        """Click the first op of a kind in the picture before (0) or after (1) the pass; its number."""
        number = self.js(f"report.graphs()[{side}].ops.find((op) => op.mnemonic === '{mnemonic}').number")
        self.js(f"report.pictures[{side}].centre(report.pictures[{side}].layout.byNumber.get({number}), false)")
        self.settle()
        place = self.js(f"report.pictures[{side}].placeOf({number})")
        self.page.mouse.click(place["x"], place["y"])
        self.settle()
        return int(number)

    def painted(self, side: int) -> int:
        """How many colours there are on a canvas."""
        return int(
            self.js(
                f"""(() => {{
                    const {{ canvas }} = report.pictures[{side}];
                    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
                    copy.drawImage(canvas, 0, 0);
                    const {{ data }} = copy.getImageData(0, 0, canvas.width, canvas.height);
                    return new Set(new Uint32Array(data.buffer)).size;
                }})()"""
            )
        )


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """``show(recorder)`` opens the report of a run; what the page complained about fails the test."""
    windows: list[Window] = []

    def opened(recorder: ReportRecorder, fragment: str = "") -> Window:
        path = tmp_path / f"report{len(windows)}.html"
        write_page(path, recorder)
        windows.append(Window(browser.new_page(viewport={"width": 1500, "height": 900}), path, fragment))
        return windows[-1]

    yield opened
    complaints = [complaint for window in windows for complaint in window.complaints]
    for window in windows:
        window.page.close()
    assert complaints == []


@pytest.fixture(scope="module")
def transformer() -> ReportRecorder:
    """A run that changes a model of five blocks, and one pass with near misses."""
    return _recorded(build_transformer(5), load_group("cleanup"), NearMisses(), title="five blocks")


def test_every_pass_can_be_chosen(show: Any, transformer: ReportRecorder) -> None:
    window = show(transformer)
    document = transformer.to_dict()
    rows = document["report"]["passes"]
    assert window.page.locator(".step").count() == len(rows) + 1
    assert window.text("#title") == "five blocks"
    assert "Whole run" in window.text("#details")
    for index, row in enumerate(rows, start=1):
        window.choose(index)
        assert window.text("#details h2") == row["name"]
        assert f"{row['ops_after']:,}" in window.text("#details dl")
        sides = (0, 1) if row["changed"] else (1,)
        assert all(window.painted(side) > 20 for side in sides)
        assert window.page.locator(".pane:visible").count() == len(sides)


def test_passes_that_changed_nothing_can_be_hidden(show: Any, transformer: ReportRecorder) -> None:
    window = show(transformer)
    rows = transformer.to_dict()["report"]["passes"]
    window.click("#hide-idle")
    shown = window.page.locator(".step:visible .name").all_inner_texts()
    assert shown == ["Whole run", *(row["name"] for row in rows if row["changed"])]
    assert "cleanup · round 2" not in window.text("#pipeline ol")
    window.click("#hide-idle")
    assert window.page.locator(".step:visible").count() == len(rows) + 1


def test_what_a_pass_changed_is_marked(show: Any, transformer: ReportRecorder) -> None:
    window = show(transformer)
    rows = transformer.to_dict()["report"]["passes"]
    index = next(i for i, row in enumerate(rows) if row["name"] == "cse" and row["changed"])
    window.choose(index + 1)
    marks = window.js("[...report.marks.values()]")
    lost = rows[index]["ops_before"] - rows[index]["ops_after"]
    assert marks.count("removed") - marks.count("added") == lost > 0
    assert f"\u2212{marks.count('removed')}" in window.text(".pane:first-child .caption")
    assert "changes" in window.text("#changes")
    window.click("#next-change")
    assert window.text("#changes").startswith("1 of ")
    window.page.keyboard.press("n")
    assert window.text("#changes").startswith("2 of ")
    window.page.keyboard.press("p")
    assert window.text("#changes").startswith("1 of ")


def test_an_op_is_clicked_and_its_operand_followed(show: Any, transformer: ReportRecorder) -> None:
    window = show(transformer)
    number = window.click_op(1, "softmax")
    details = window.text("#details")
    assert "softmax" in window.text("#details h2")
    assert "f32[batch, 4, 17, 17]" in details
    assert "dim" in details
    source = window.js(f"report.graphs()[1].values.get({number}).op.operands[0].value")
    window.click("#details button.value")
    assert window.js("report.selected") == source
    assert window.js(f"report.pictures[1].isVisible(report.pictures[1].layout.byNumber.get({source}))")
    # The reader of that value leads back.
    window.click("#details .readers button:has-text('softmax')")
    assert window.js("report.selected") == number
    window.page.keyboard.press("Escape")
    assert "Whole run" in window.text("#details h2")


def test_an_op_that_a_rule_made_says_so(show: Any, transformer: ReportRecorder) -> None:
    window = show(transformer)
    made = window.js("report.graphs()[1].ops.find((op) => op.madeBy)?.number ?? null")
    assert made is not None
    window.js(f"report.select({made})")
    rule = window.js(f"report.graphs()[1].values.get({made}).op.madeBy")
    assert rule in window.text("#details dl")


def test_search_finds_ops_weights_and_shows_them(show: Any, transformer: ReportRecorder) -> None:
    window = show(transformer)
    window.page.keyboard.press("/")
    window.page.keyboard.type("softmax")
    window.settle()
    assert window.text("#search-count") == "5"
    assert window.page.locator("#search-results button").count() == 5
    window.page.keyboard.press("Enter")
    window.page.keyboard.press("Enter")
    window.settle()
    assert window.text("#search-count") == "2/5"
    assert "softmax" in window.text("#details h2")
    # The second softmax is in a folded block, which opens.
    number = window.js("report.selected")
    nowhere = "{ x: 1e9, y: 1e9 }"
    assert window.js(f"report.visible.some((p) => p.isVisible(p.layout.byNumber.get({number}) ?? {nowhere}))")
    window.page.fill("#search", "blocks.3.fc1.weight")
    window.settle()
    assert int(window.text("#search-count")) >= 1
    window.page.keyboard.press("ArrowDown")
    window.settle()
    assert "@blocks.3.fc1.weight" in window.text("#details")
    window.page.fill("#search", "no such thing")
    window.settle()
    assert window.text("#search-count") == "0"
    assert "nothing in this graph" in window.text("#search-results")


def test_equal_blocks_are_folded_and_unfolded(show: Any, transformer: ReportRecorder) -> None:
    window = show(transformer)
    drawn = "report.pictures[0].layout.nodes.filter((node) => !node.fold).length"
    all_nodes = window.js("report.pictures[0].layout.nodes.length")
    folded = window.js(drawn)
    assert folded < all_nodes / 3
    window.click("#fold")
    assert window.js(drawn) == all_nodes
    window.click("#fold")
    assert window.js(drawn) == folded
    # A click on the fold itself opens these blocks, in both pictures.
    window.js("(() => { const p = report.pictures[0]; p.centre(p.layout.nodes.find((node) => node.fold), false); })()")
    window.settle()
    node = window.js("report.pictures[0].layout.nodes.find((node) => node.fold).number")
    place = window.js(f"report.pictures[0].placeOf({node})")
    window.page.mouse.click(place["x"], place["y"])
    window.settle()
    assert window.js(drawn) == all_nodes


def test_boxes_do_not_overlap_and_lines_do_not_cross_them(show: Any, transformer: ReportRecorder) -> None:
    window = show(transformer)
    window.click("#fold")
    overlaps = """(side) => {
        const { layout } = report.pictures[side];
        const around = (middle, extent) => [middle - extent / 2, middle + extent / 2];
        const boxes = layout.nodes.map((n) => [...around(n.x, n.width), ...around(n.y, n.height)]);
        boxes.sort((a, b) => a[2] - b[2]);
        let count = 0;
        boxes.forEach((a, i) => {
            for (let j = i + 1; j < boxes.length && boxes[j][2] < a[3]; j++) {
                if (boxes[j][0] < a[1] && a[0] < boxes[j][1]) count++;
            }
        });
        for (const item of layout.elements) {
            for (const { segments } of item.shape.lines) for (const [x, top, bottom] of segments) {
                const [high, low] = [top + item.top, bottom + item.top];
                if (item.stretch.members.some((n) => Math.abs(n.x - x) < n.width / 2 - 1
                    && Math.min(n.y + n.height / 2, low) - Math.max(n.y - n.height / 2, high) > 1)) count++;
            }
        }
        return count;
    }"""
    assert window.page.evaluate(overlaps, 0) == 0
    assert window.page.evaluate(overlaps, 1) == 0


def test_chains_of_ops_run_straight_down(show: Any, transformer: ReportRecorder) -> None:
    window = show(transformer)
    bends = window.js(
        """(() => {
            const { layout } = report.pictures[1];
            const { graph } = layout;
            const sources = (op) => op.operands.map((operand) => graph.values.get(operand.value)?.op)
                .filter((source) => source && source.mnemonic !== "full");
            return graph.ops.flatMap((op) => {
                const readers = graph.readers.get(op.number) ?? [];
                if (op.mnemonic === "full" || readers.length !== 1 || sources(readers[0]).length !== 1) return [];
                const [from, to] = [op, readers[0]].map((one) => layout.byNumber.get(one.number));
                return from.fold || to.fold ? [] : [Math.abs(from.x - to.x)];
            });
        })()"""
    )
    assert len(bends) > 10
    assert sum(bend < 1 for bend in bends) > 0.8 * len(bends)


def test_moving_and_scaling_and_the_other_side_follows(show: Any, transformer: ReportRecorder) -> None:
    window = show(transformer)
    window.choose(2)
    view = "({ ...report.pictures[0].view })"
    box = window.page.locator(".pane canvas").first.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    start = window.js(view)
    window.page.mouse.move(*middle)
    window.page.mouse.down()
    window.page.mouse.move(middle[0] + 40, middle[1] - 100, steps=4)
    window.page.mouse.up()
    window.settle()
    dragged = window.js(view)
    assert (dragged["x"] - start["x"], dragged["y"] - start["y"]) == pytest.approx((40, -100))
    window.page.mouse.wheel(0, 120)
    window.settle()
    scrolled = window.js(view)
    assert scrolled["y"] == pytest.approx(dragged["y"] - 120)
    assert scrolled["k"] == dragged["k"]
    window.page.keyboard.down("Control")
    window.page.mouse.wheel(0, -240)
    window.page.keyboard.up("Control")
    window.settle()
    assert window.js(view)["k"] > scrolled["k"]
    # An op near the middle that both sides have stands at the same height in both.
    gap = window.js(
        """(() => {
            const [a, b] = report.pictures;
            const y = (a.size.height * 0.42 - a.view.y) / a.view.k;
            const shared = a.layout.nodes.filter((n) => !n.fold && b.layout.byNumber.has(n.number));
            const node = shared.reduce((best, n) => (Math.abs(n.y - y) < Math.abs(best.y - y) ? n : best));
            return Math.abs(a.placeOf(node.number).y - b.placeOf(node.number).y);
        })()"""
    )
    assert gap < 60
    window.click("#zoom-out")
    window.click("#fit")
    assert window.js(view)["k"] <= 1


def test_before_after_and_both(show: Any, transformer: ReportRecorder) -> None:
    window = show(transformer)
    for view, captions in (("before", ["before"]), ("after", ["after"]), ("both", ["before", "after"])):
        window.click(f"button[data-view={view}]")
        shown = window.page.locator(".pane:visible .caption b").all_inner_texts()
        assert [caption.lower() for caption in shown] == captions
    window.page.keyboard.press("j")
    assert window.js("report.list.entries.indexOf(report.entry)") == 1
    window.page.keyboard.press("k")
    assert window.js("report.list.entries.indexOf(report.entry)") == 0


def test_near_misses_are_told_and_lead_to_the_op(show: Any, transformer: ReportRecorder) -> None:
    window = show(transformer)
    assert "1 near" in window.text(".step:has-text('near-misses')")
    window.click(".step:has-text('near-misses')")
    details = window.text("#details")
    for part in ("gelu-erf", "tried 4", "3 of 5 ops matched", "model.py:7", "1.5, not sqrt(2)", "nothing was raised",
                 "sqnr db", "W8A8", "31.4"):  # fmt: skip
        assert part in details
    window.click("#details figure button")
    assert "erf" in window.page.input_value("#search")


def test_dark_and_light(show: Any, transformer: ReportRecorder) -> None:
    window = show(transformer)
    colour = "getComputedStyle(document.body).backgroundColor"
    light = window.js(colour)
    window.click("#theme")
    assert window.js(colour) != light
    assert window.painted(1) > 20
    window.page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    window.page.reload()
    window.page.wait_for_function("window.report !== undefined")
    assert window.js("document.documentElement.dataset.theme") == "dark"


def test_the_address_says_what_is_shown(show: Any, transformer: ReportRecorder) -> None:
    window = show(transformer)
    window.choose(3)
    number = window.click_op(1, "erf")
    address = window.js("location.hash")
    again = show(transformer, address)
    assert again.js("report.list.entries.indexOf(report.entry)") == 3
    assert again.js("report.selected") == number
    assert "erf" in again.text("#details h2")


def test_names_are_never_read_as_markup(show: Any) -> None:
    window = show(_recorded(_hostile_module(), load_group("cleanup"), title=HOSTILE))
    assert window.js("window.hacked") is None
    # Line separators are white space to the browser.
    assert window.js("document.getElementById('title').textContent") == HOSTILE
    window.click_op(1, "linear")
    details = window.js("document.getElementById('details').textContent")
    assert f"@{HOSTILE}" in details
    window.page.fill("#search", "onerror")
    window.settle()
    assert int(window.text("#search-count")) >= 1
    assert window.page.locator("img").count() == 0
    assert window.js("window.hacked") is None


def test_a_failed_run_shows_where_and_why(show: Any) -> None:
    window = show(_recorded(build_transformer(2), load_group("cleanup"), Fails()))
    assert "failed" in window.text("#summary")
    assert "the softmax is in the way" in window.text("#details [role=alert]")
    window.choose(window.page.locator(".step").count() - 1)
    assert "failed" in window.text(".step.failed")
    assert "the softmax is in the way" in window.text("#details [role=alert]")
    assert window.js("[...report.marks.values()].sort().join()") == "added,changed"


def test_regions_have_pictures_of_their_own(show: Any) -> None:
    window = show(_recorded(_module_with_a_region(), load_group("cleanup")))
    assert window.page.locator("#graph option").all_inner_texts() == ["main", "main / repeat 1 body"]
    window.page.select_option("#graph", "main / repeat 1 body")
    window.settle()
    assert window.js("report.graphs()[1].ops.map((op) => op.mnemonic).join()") == "linear"
    assert window.painted(1) > 20


def test_an_empty_graph_and_an_empty_pipeline(show: Any) -> None:
    b = Builder()
    b.output(b.input("x", TensorType(F32, (2,))))
    window = show(_recorded(b.module))
    assert window.page.locator(".step").count() == 1
    assert window.painted(1) > 5
