"""``trimtab inspect --tokens``: the analysis in words and as data, and the drawing of merged patches over a picture."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_harness import Commands

import trimtab
from trimtab.cli.token_picture import GAP, LINE, PANELS_IN_A_ROW, cell_size, grid_of, painted, panel_origin
from trimtab.errors import MissingDependencyError, PassError, UsageError
from trimtab.user_file import call_function, load_function

_MODELS = """
import torch
import torch.nn.functional as F
from torch import nn

BATCH = {"image": {0: torch.export.Dim("batch", min=1, max=8)}}


class Block(nn.Module):
    def __init__(self, width, causal):
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        batch, count, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, count, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # the line of attention
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, count, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Vit(nn.Module):
    def __init__(self, patch, patches, depth=1, dense=False, causal=False, channels=3):
        super().__init__()
        self.dense = dense
        self.patches = nn.Conv2d(channels, 16, patch, patch)
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, patches + 1, 16))
        self.blocks = nn.Sequential(*(Block(16, causal) for _ in range(depth)))
        self.head = nn.Linear(16, 5)

    def forward(self, image):
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.places
        x = self.blocks(x)
        return x if self.dense else self.head(x[:, 0])


def made(*args, channels=3, **options):
    torch.manual_seed(0)
    return Vit(*args, channels=channels, **options).eval(), (torch.randn(2, channels, 24, 24),), None, BATCH


def build():
    return made(4, 36, depth=3)


def grey():
    return made(4, 36, channels=1)[:2]


def dense():
    return made(4, 36, dense=True)


def causal():
    return made(4, 36, causal=True)


def oblong():
    return made((4, 8), 18)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = made(4, 36)[0]

    def forward(self, image, scale):
        return self.vit(image * scale)


def two():
    return Two().eval(), (torch.randn(2, 3, 24, 24), torch.ones(1))
"""
_GRID = (6, 6)
_CELL = cell_size(_GRID)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``vit.py``; its model as ``vit.ttir``, and as ``vit.onnx`` written by torch's exporter."""
    made = tmp_path_factory.mktemp("tokens")
    (made / "vit.py").write_text(_MODELS)
    model, args, _, shapes = call_function(load_function(made / "vit.py", "build"), made / "vit.py", "build")
    trimtab.write(trimtab.trace(model, args, dynamic_shapes=shapes), made / "vit.ttir")
    logging.disable(logging.WARNING)
    try:
        program = torch.onnx.export(model, args, dynamo=True, dynamic_shapes=shapes, verbose=False)
        program.save(made / "vit.onnx")
    finally:
        logging.disable(logging.NOTSET)
    return made


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.chdir(folder)
    return Commands(capsys)


@pytest.fixture
def picture(folder: Path) -> Path:
    """A colourful picture that is not square."""
    image = pytest.importorskip("PIL.Image")
    down, right = np.mgrid[0:90, 0:120]
    pixels = np.stack([down * 2, right * 2, (down + right) % 256], -1).astype(np.uint8)
    with open(folder / "picture.png", "wb") as file:
        image.fromarray(pixels).save(file, format="PNG")
    return folder / "picture.png"


def test_the_analysis_of_a_model_from_both_doors(commands: Commands, folder: Path) -> None:
    line = next(n for n, text in enumerate(_MODELS.splitlines(), 1) if "the line of attention" in text)
    for model in ("vit.ttir", "vit.onnx"):
        document = commands.ok("inspect", model, "--tokens", "--json").json
        assert (document["kind"], document["tokens"], document["protected"]) == ("tokens", 37, 1)
        assert [layer["blockers"] for layer in document["layers"]] == [[], [], []]
        assert document["refused"] == []
        text = "\n".join(document["lines"])
        assert "3 attention layers in a residual stream of 37 tokens, 1 of them protected" in text
        assert text.count("can be reduced") == 3
        if model == "vit.py:build":
            assert all(f"vit.py:{line}" in layer["location"] for layer in document["layers"])


def test_the_analysis_says_what_needs_all_tokens(commands: Commands) -> None:
    document = commands.ok("inspect", "vit.py:dense", "--tokens", "--json").json
    (blocker,) = document["layers"][0]["blockers"]
    assert blocker["output"] == "output"
    assert "has a row for each token" in blocker["reason"]
    assert "has a row for each token" in "\n".join(document["lines"])


def test_the_analysis_in_words(commands: Commands) -> None:
    lines = commands.ok("inspect", "vit.ttir", "--tokens", "--json").json["lines"]
    assert commands.ok("inspect", "vit.ttir", "--tokens").out.splitlines() == lines


def test_a_model_without_tokens_to_reduce_is_refused_with_the_line(commands: Commands) -> None:
    outcome = commands("inspect", "vit.py:causal", "--tokens")
    assert outcome.code == PassError.exit_code
    assert "attention is causal" in outcome.err
    assert "vit.py:" in outcome.err


@pytest.mark.parametrize("model", ["vit.ttir", "vit.onnx"])
def test_the_drawing(commands: Commands, picture: Path, model: str) -> None:
    document = commands.ok(
        "inspect", model, "--tokens", picture, "--passes", "cleanup,merge-tokens{r=9}", "-o", "merged.png", "--json"
    ).json
    assert document["pass"] == "merge-tokens{r=9}"
    assert document["grid"] == [6, 6]
    assert [(made["layer"], made["before"], made["after"]) for made in document["reductions"]] == [
        (0, 37, 28), (1, 28, 19), (2, 19, 10)]  # fmt: skip
    drawn = _read(Path("merged.png"))
    side = 6 * _CELL
    bottom, right = (origin + side + GAP for origin in panel_origin(_GRID, 3))
    assert drawn.shape == (bottom, right, 3)
    plain = _panel(drawn, 0)
    for number, made in enumerate(document["reductions"], 1):
        rows = np.array(made["rows"])
        assert rows.shape == (37,)
        assert rows[0] == 0
        assert made["kept"] + made["merged"] == 36
        assert made["kept"] + made["groups"] == made["after"] - 1
        panel = _panel(drawn, number)
        for row in range(1, made["after"]):
            patches = np.flatnonzero(rows[1:] == row)
            areas = [_inside(panel, patch) for patch in patches]
            originals = [_inside(plain, patch, 0) for patch in patches]
            if len(patches) == 1:
                assert np.array_equal(areas[0], _inside(plain, patches[0]))
            else:
                (colour,) = {tuple(pixel) for area in areas for pixel in area.reshape(-1, 3)}
                assert np.abs(np.mean(originals, (0, 1, 2)) - colour).max() <= 0.51
        assert (panel != plain).any()


def test_words_and_options_of_the_drawing(commands: Commands, picture: Path) -> None:
    drawing = ["--tokens", picture, "--passes", "merge-tokens{r=9}", "-o", "other.png"]
    text = commands.ok("inspect", "vit.py:grey", *drawing, "--mean", "0.4", "--std", "0.2").out
    assert "layer 0: 37 tokens become 28; " in text
    assert "drawn to other.png" in text
    first, same, other = (
        commands.ok("inspect", "vit.ttir", *drawing, "--json", *mean).json["reductions"]
        for mean in ([], ["--mean", "0.5,0.5,0.5"], ["--mean", "0,0.9,0.1"])
    )
    assert first == same
    assert first != other


@pytest.mark.parametrize(
    ("model", "arguments", "part"),
    [
        ("vit.ttir", ["picture.png"], "IMAGE belongs to --tokens"),
        ("vit.ttir", ["--mean", "0"], "--mean belongs to --tokens"),
        ("vit.ttir", ["--tokens", "-o", "x.png"], "--output needs a picture"),
        ("vit.ttir", ["--tokens", "--ops"], "--tokens goes with none of"),
        ("vit.ttir", ["--tokens", "picture.png"], "there is no pass to draw"),
        ("vit.ttir", ["--tokens", "picture.png", "--passes", "merge-tokens"], "written to a .png file"),
        ("vit.ttir", ["--tokens", "picture.png", "--passes", "merge-tokens", "-o", "x.jpg"], "a .png file"),
        ("vit.ttir", ["--tokens", "picture.png", "--passes", "merge-tokens", "-o", "no/x.png"], "does not exist"),
    ],
)
def test_options_that_do_not_go_together(commands: Commands, model: str, arguments: list[str], part: str) -> None:
    outcome = commands("inspect", model, *arguments)
    assert outcome.code == UsageError.exit_code
    assert part in outcome.err


@pytest.mark.parametrize(
    ("model", "passes", "arguments", "part"),
    [
        ("vit.ttir", "cleanup", [], "there is no pass to draw"),
        ("vit.ttir", "merge-tokens{r=2},merge-tokens{r=2}", [], "only one reduction can be drawn"),
        ("vit.ttir", "merge-tokens{r=0}", [], "reduced nothing"),
        ("vit.ttir", "merge-tokens{r=2}", ["--std", "0"], "cannot read --std"),
        ("vit.ttir", "merge-tokens{r=2}", ["--mean", "1,2"], "cannot read --mean"),
        ("vit.py:oblong", "merge-tokens{r=2}", [], "do not form a grid of square patches"),
        ("vit.py:two", "merge-tokens{r=2}", [], "the model does not take a picture"),
    ],
)
def test_what_cannot_be_drawn(
    commands: Commands, picture: Path, model: str, passes: str, arguments: list[str], part: str
) -> None:
    outcome = commands("inspect", model, "--tokens", picture, "--passes", passes, "-o", "none.png", *arguments)
    assert outcome.code == UsageError.exit_code
    assert part in outcome.err
    assert not Path("none.png").exists()


def test_pictures_that_cannot_be_read(commands: Commands, picture: Path) -> None:
    Path("broken.png").write_bytes(b"no picture")
    for name, part in (("missing.png", "there is no such picture"), ("broken.png", "the picture cannot be read")):
        outcome = commands("inspect", "vit.ttir", "--tokens", name, "--passes", "merge-tokens{r=2}", "-o", "x.png")
        assert outcome.code == UsageError.exit_code
        assert part in outcome.err


def test_without_pillow_the_message_says_what_to_install(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    outcome = commands("inspect", "vit.ttir", "--tokens", "x.png", "--passes", "merge-tokens{r=2}", "-o", "x.png")
    assert outcome.code == MissingDependencyError.exit_code
    assert 'pip install "trimtab[report]"' in outcome.err
    assert "pillow" in outcome.err


def test_painting_greys_dropped_patches_and_outlines_groups() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    result = painted(pixels, (2, 2), np.array([4, 4, -1, 7]))
    assert np.array_equal(result[16:, 16:], pixels[16:, 16:])
    grey = result[16:, :16]
    assert (grey == grey[..., :1]).all()
    assert grey.min() >= 150
    group = result[:16]
    inside = group[LINE:-LINE, LINE:-LINE]
    assert (inside == np.round(pixels[:16].reshape(-1, 3).mean(0))).all()  # no line between the two
    border = [group[:LINE], group[-LINE:], group[:, :LINE], group[:, -LINE:]]
    (line,) = {tuple(pixel) for area in border for pixel in area.reshape(-1, 3)}
    assert line != tuple(inside[0, 0])


@pytest.mark.parametrize(
    ("patches", "height", "width", "grid"),
    [(196, 224, 224, (14, 14)), (8, 32, 64, (2, 4)), (6, 48, 32, (3, 2)), (8, 32, 32, None), (2, 32, 32, None)],
)
def test_grids(patches: int, height: int, width: int, grid: tuple[int, int] | None) -> None:
    assert grid_of(patches, height, width) == grid


def test_four_panels_are_in_a_row() -> None:
    assert panel_origin(_GRID, PANELS_IN_A_ROW)[1] == panel_origin(_GRID, 0)[1]
    assert panel_origin(_GRID, PANELS_IN_A_ROW)[0] > panel_origin(_GRID, 0)[0] + 6 * _CELL


def _read(path: Path) -> np.ndarray:
    image = pytest.importorskip("PIL.Image")
    with image.open(path) as opened:
        return np.array(opened.convert("RGB"), dtype=np.uint8)


def _panel(drawn: np.ndarray, number: int) -> np.ndarray:
    top, left = panel_origin(_GRID, number)
    return drawn[top : top + 6 * _CELL, left : left + 6 * _CELL]


def _inside(panel: np.ndarray, patch: int, edge: int = LINE) -> np.ndarray:
    """A patch without the lines at its border."""
    down, right = divmod(int(patch), 6)
    return panel[down * _CELL + edge : (down + 1) * _CELL - edge, right * _CELL + edge : (right + 1) * _CELL - edge]
