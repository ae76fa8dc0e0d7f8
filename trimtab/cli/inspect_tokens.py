"""``trimtab inspect --tokens``: the tokens of a model, and what a pass does to the patches of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.command_options import require_directory
from trimtab.errors import UsageError

if TYPE_CHECKING:
    import torch

    from trimtab.cli.progress import Update
    from trimtab.ir import Module
    from trimtab.passes.tokens.reduction import TokenReduction
    from trimtab.passes.tokens.stream import Blocker, Stream
    from trimtab.passes.tokens.trace import TokenTrace, TracedReduction


@dataclass(frozen=True)
class TokenOptions:
    """The options of the command that belong to ``--tokens``, as given.

    Attributes:
        picture: the picture to run the model on; None prints the analysis alone.
        passes: the pipeline whose reduction is drawn.
        output: the drawing.
        mean, std: of the model's preprocessing: one number, or one a channel, separated by commas.
    """

    picture: Path | None
    passes: str | None
    output: Path | None
    mean: str | None
    std: str | None

    def check(self, tokens: bool) -> None:
        """Refuse, before any work, options that do not go together.

        Raises:
            UsageError: as above.
        """
        extras = {"IMAGE": self.picture, "--passes": self.passes, "--output": self.output, "--mean": self.mean,
                  "--std": self.std}  # fmt: skip
        given = [name for name, value in extras.items() if value is not None]
        if given and not tokens:
            raise UsageError(f"{given[0]} belongs to --tokens", fix="add --tokens, or leave it out")
        if self.picture is None:
            if given:
                raise UsageError(
                    f"{given[0]} needs a picture to draw tokens over",
                    fix='trimtab inspect MODEL --tokens IMAGE --passes "merge-tokens{r=13}" -o tokens.png',
                )
            return
        if self.passes is None:
            raise UsageError(
                "there is no pass to draw",
                rule="--passes names the reduction whose tokens are drawn",
                fix='for example --passes "merge-tokens{r=13}"',
            )
        if self.output is None or self.output.suffix.lower() != ".png":
            raise UsageError("a drawing is written to a .png file", values={"output": self.output},
                             fix="-o tokens.png")  # fmt: skip
        require_directory(self.output, "--output")


def inspect_tokens(model: str, options: TokenOptions) -> dict[str, Any]:
    """What was found about the tokens of ``model``; with a picture, also what a pass does, drawn to a file.

    Raises:
        PassError: the model has no tokens that were found, or the pass cannot reduce them.
        UsageError: the picture does not fit the model, or the pipeline reduces no tokens.
    """
    from trimtab.cli.model_argument import load_model
    from trimtab.cli.progress import progress_bar
    from trimtab.passes.tokens.reduction import with_attention
    from trimtab.passes.tokens.stream import find_stream

    with progress_bar("inspect") as update:
        update("import the model", 0.0)
        module = load_model(model)
        update("find the tokens", 0.2)
        document = {"model": model, "kind": "tokens", **_stream_data(find_stream(with_attention(module)))}
        if options.picture is not None:
            document |= _draw(module, options, update)
    return document


def print_tokens(document: dict[str, Any]) -> None:
    """The document for people."""
    for line in document["lines"]:
        print(line)
    for reduction in document.get("reductions", ()):
        print(_in_words(reduction))
    if "output" in document:
        print(f"drawn to {document['output']}")


def _stream_data(stream: Stream) -> dict[str, Any]:
    return {
        "tokens": stream.tokens,
        "protected": stream.protected,
        "layers": [
            {
                "layer": number,
                "tokens": layer.tokens,
                "location": _text(layer.attention.location),
                "blockers": [_blocker_data(blocker) for blocker in layer.blockers],
                "entry_blockers": [_blocker_data(blocker) for blocker in layer.entry_blockers],
            }
            for number, layer in enumerate(stream.layers)
        ],
        "refused": [_blocker_data(blocker) for blocker in stream.refused],
        "lines": stream.describe(),
    }


def _blocker_data(blocker: Blocker) -> dict[str, Any]:
    return {
        "reason": blocker.reason,
        "op": blocker.op.name if blocker.op is not None else None,
        "location": _text(blocker.location),
        "output": blocker.output or None,
    }


def _text(location: object) -> str | None:
    return str(location) if location is not None else None


def _draw(module: Module, options: TokenOptions, update: Update) -> dict[str, Any]:
    from trimtab.atomic_file import write_atomically
    from trimtab.cli.token_picture import Panel, Picture, draw, grid_of, model_input
    from trimtab.passes.tokens.trace import trace_tokens

    assert options.picture is not None
    assert options.passes is not None
    assert options.output is not None
    batch, channels, height, width = _image_input(module)
    mean = _numbers("--mean", options.mean, channels)
    std = _numbers("--std", options.std, channels)
    picture = Picture(options.picture)
    update("run the passes before", 0.3)
    module, reduction = _reduction(module, options.passes)
    update(f"run {reduction.name}", 0.5)
    image = model_input(picture.pixels(height, width), channels, mean, std)
    trace = trace_tokens(module, reduction, [_tensor(module, image[None].repeat(batch, 0))])
    update("draw", 0.9)
    patches = trace.tokens - trace.protected
    _check_drawable(trace, reduction)
    grid = grid_of(patches, height, width)
    if grid is None:
        raise UsageError(
            "the tokens do not form a grid of square patches",
            values={"tokens": trace.tokens, "protected": trace.protected, "picture": f"{height}x{width}"},
            rule="tokens that are not protected are drawn as the patches of a picture, row by row: "
            "of a square picture their number is a square",
        )
    panels = [Panel(f"{patches} patches")]
    for made in trace.reductions:
        if made.rows is not None:
            caption = f"layer {made.layer}: {made.before} to {made.after}"
            panels.append(Panel(caption, made.rows[0, trace.protected :]))
    write_atomically(options.output, draw(picture, grid, panels))
    return {
        "pass": str(reduction),
        "picture": str(options.picture),
        "output": str(options.output),
        "grid": list(grid),
        "reductions": [_reduction_data(made, trace.protected) for made in trace.reductions],
    }


def _reduction_data(made: TracedReduction, protected: int) -> dict[str, Any]:
    data: dict[str, Any] = {"layer": made.layer, "before": made.before, "after": made.after, "rows": None}
    if made.rows is None:
        return data
    import numpy as np

    rows = made.rows[0, protected:]
    counts = np.unique(rows[rows >= 0], return_counts=True)[1]
    return {
        **data,
        "rows": made.rows[0].tolist(),
        "kept": int((counts == 1).sum()),
        "merged": int(counts[counts > 1].sum()),
        "groups": int((counts > 1).sum()),
        "dropped": int((rows < 0).sum()),
    }


def _in_words(made: dict[str, Any]) -> str:
    start = f"layer {made['layer']}: {made['before']} tokens become {made['after']}"
    if made["rows"] is None:
        return f"{start}, each mixed out of all others, so that no patch is in one place and nothing is drawn"
    parts = [f"{made['kept']} patches alone"]
    if made["groups"]:
        parts.append(f"{made['merged']} merged into {made['groups']}")
    if made["dropped"]:
        parts.append(f"{made['dropped']} dropped")
    return f"{start}; {', '.join(parts)}"


def _reduction(module: Module, passes: str) -> tuple[Module, TokenReduction]:
    """The one reduction of a pipeline, and the module after what comes before it."""
    from trimtab.passes.manager import PassManager
    from trimtab.passes.pipeline import Pipeline, parse_pipeline
    from trimtab.passes.tokens.reduction import TokenReduction

    items = parse_pipeline(passes).items
    found = [(index, item) for index, item in enumerate(items) if isinstance(item, TokenReduction)]
    if len(found) != 1:
        raise UsageError(
            "there is no pass to draw" if not found else "only one reduction can be drawn at a time",
            values={"passes": passes or "none"},
            rule="one of --passes reduces tokens by merging or dropping them",
            fix='for example --passes "merge-tokens{r=13}"',
        )
    index, reduction = found[0]
    if index:
        module = PassManager(Pipeline(items[:index]), check="never").run(module)[0]
    return module, reduction


def _check_drawable(trace: TokenTrace, reduction: TokenReduction) -> None:
    if not trace.reductions:
        raise UsageError(
            f"{reduction.name} reduced nothing, so there is nothing to draw",
            values={"pass": reduction},
            fix="ask for more, for example r=13 or budget=0.6",
        )
    if all(made.rows is None for made in trace.reductions):
        raise UsageError(
            f"what {reduction.name} does cannot be drawn",
            values={"pass": reduction},
            rule="it mixes each token out of all others, so that no patch is in one place",
            fix="draw a pass that merges or drops patches, such as merge-tokens",
        )


def _image_input(module: Module) -> tuple[int, int, int, int]:
    """The shape ``[B, C, H, W]`` of the only input, with the smallest batch."""
    from trimtab.ir.dims import evaluate
    from trimtab.passes.samples import smallest_sizes

    inputs = module.main.inputs
    shape = inputs[0].type.shape if len(inputs) == 1 and inputs[0].type.dtype.is_floating else ()
    if len(shape) != 4 or shape[1] not in (1, 3) or not isinstance(shape[2], int) or not isinstance(shape[3], int):
        raise UsageError(
            "the model does not take a picture",
            values={"inputs": ", ".join(f"{value.name}: {value.type}" for value in inputs)},
            rule="its only input is floating [batch, 3 or 1, height, width] with height and width fixed",
            fix="leave the picture out to see the analysis alone",
        )
    batch = int(evaluate(shape[0], smallest_sizes(module.main)))
    return batch, 1 if shape[1] == 1 else 3, shape[2], shape[3]


def _tensor(module: Module, image: Any) -> torch.Tensor:
    import torch

    return torch.from_numpy(image).to(module.main.inputs[0].type.dtype.to_torch())


def _numbers(option: str, text: str | None, channels: int) -> Sequence[float]:
    try:
        values = [float(part) for part in (text or "0.5").split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, channels) or (option == "--std" and min(values) <= 0):
        raise UsageError(
            f"cannot read {option}",
            values={"given": repr(text), "channels": channels},
            rule="it is one number, or one for each channel separated by commas; a standard deviation is positive",
            fix=f"for example {option} 0.485,0.456,0.406" if channels == 3 else f"for example {option} 0.5",
        )
    return values
