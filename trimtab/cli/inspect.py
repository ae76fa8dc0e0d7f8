"""``trimtab inspect``: what a model or an artifact takes, gives, holds and needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli.command_options import DebugOption, JsonOption, split_counts
from trimtab.errors import UsageError


def inspect_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A .trim artifact, a .onnx, .pt2 or .ttir file, or file.py:function.",
            show_default=False,
        ),
    ],
    image: Annotated[
        Path | None,
        typer.Argument(metavar="[IMAGE]", help="With --tokens: draw what --passes do to this picture's patches."),
    ] = None,
    ops: Annotated[bool, typer.Option("--ops", help="Print the text of the IR instead.")] = False,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Show where tokens can be reduced, and why not elsewhere, instead.")
    ] = False,
    passes: Annotated[
        str | None,
        typer.Option(metavar="PIPELINE", help="With IMAGE: the reduction to draw, such as merge-tokens{r=13}."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.png", help="With IMAGE: write the drawing here.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(metavar="M", help="With IMAGE: of the model's pixels, one or a channel; 0.5.")
    ] = None,
    std: Annotated[
        str | None, typer.Option(metavar="S", help="With IMAGE: their standard deviation, likewise; 0.5.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Of an artifact, count ops, MACs and parameters too, which needs torch.")
    ] = False,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N", help="A dynamic size to count MACs and bytes for, such as batch=8 (repeatable)."
        ),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show signature, ops, MACs, parameters and bytes of a model; of an artifact also target, passes and versions."""
    from trimtab.cli.inspect_tokens import TokenOptions, inspect_tokens, print_tokens

    options = TokenOptions(image, passes, output, mean, std)
    options.check(tokens)
    if tokens and (ops or full or size):
        raise UsageError("--tokens goes with none of --ops, --full and --size", fix="ask for one at a time")
    sizes = split_counts("--size", size or (), "batch=8")
    if tokens:
        document = inspect_tokens(model, options)
    elif Path(model).suffix == ".trim":
        document = _inspect_artifact(Path(model), ops, full, sizes)
    else:
        document = _inspect_module(model, ops, sizes)
    if json:
        from trimtab.cli.output import print_json

        print_json(document)
    elif tokens:
        print_tokens(document)
    elif ops:
        print(document["text"].rstrip("\n"))
    else:
        _print(document)


def _inspect_module(model: str, ops: bool, sizes: Mapping[str, int]) -> dict[str, Any]:
    from trimtab.cli.model_argument import load_model
    from trimtab.cli.module_summary import summarize
    from trimtab.ir import print_module

    module = load_model(model)
    document = {"model": model, "kind": "module", **summarize(module, sizes)}
    return {**document, "text": print_module(module, hashes=False)} if ops else document


def _inspect_artifact(path: Path, ops: bool, full: bool, sizes: Mapping[str, int]) -> dict[str, Any]:
    from trimtab.runtime import ArtifactReader
    from trimtab.runtime.manifest import MODULE_ENTRY

    reader = ArtifactReader(path, verify="code")
    manifest = reader.manifest
    bound = {symbol.name: sizes.get(symbol.name, symbol.min) for symbol in manifest.symbols}
    document: dict[str, Any] = {
        "model": str(path),
        "kind": "artifact",
        "name": manifest.name,
        "bytes": path.stat().st_size,
        "inputs": [str(spec) for spec in manifest.inputs],
        "outputs": [str(spec) for spec in manifest.outputs],
        "symbols": [str(symbol) for symbol in manifest.symbols],
        "weights": len(manifest.weights),
        "weight_bytes": sum(record.array.nbytes for record in reader.weights().values()),
        "pipeline": manifest.pipeline,
        "precision": manifest.precision,
        "passes_applied": _applied(manifest.report),
        "memory": manifest.memory,
        "memory_sizes": bound,
        "memory_bytes": _bytes_at(manifest.memory, bound),
        "variants": [
            {
                "target": variant.target,
                "backend": variant.backend,
                "features": list(variant.features),
                "runtime_in_file": bool(variant.runtime),
                "requires": variant.requires,
                "runs_here": _refusal(variant, path) == "",
                "refusal": _refusal(variant, path),
            }
            for variant in manifest.variants
        ],
        "versions": manifest.versions,
        "schema": manifest.schema,
        "entries": {name: entry.size for name, entry in manifest.entries.items()},
    }
    text = bytes(reader.view(MODULE_ENTRY)).decode("utf-8") if MODULE_ENTRY in reader else ""
    if full:
        document = {**_count(text, path, sizes), **document}
    return {**document, "text": text} if ops else document


def _count(text: str, path: Path, sizes: Mapping[str, int]) -> dict[str, Any]:
    from trimtab.cli.model_argument import require_torch
    from trimtab.cli.module_summary import summarize

    require_torch("counting the ops of an artifact needs torch")
    from trimtab.ir import parse_module

    return summarize(parse_module(text, file=f"{path}/module.ttir"), sizes)


def _bytes_at(memory: Any, sizes: Mapping[str, int]) -> dict[str, int]:
    """The counts of a manifest's ``memory`` with the symbols at ``sizes`` (free JSON: anything odd is left out)."""
    from trimtab.runtime.dimension import MAX_TEXT, evaluate, symbols_of

    counts = memory.items() if isinstance(memory, Mapping) else ()
    readable = {name: n for name, n in counts if type(n) is int or (isinstance(n, str) and len(n) <= MAX_TEXT)}
    return {name: evaluate(n, sizes) for name, n in readable.items() if symbols_of(n) <= sizes.keys()}


def _applied(report: Any) -> list[str]:
    """Passes that changed the module, from the report in a manifest (free JSON: anything odd in it is left out)."""
    rows = report.get("passes", []) if isinstance(report, Mapping) else []
    return [str(row.get("text", "")) for row in rows if isinstance(row, Mapping) and row.get("changed")]


def _refusal(variant: Any, path: Path) -> str:
    from trimtab.errors import ArtifactError
    from trimtab.runtime.variants import select_variant

    try:
        select_variant([variant], str(path))
    except ArtifactError as error:
        return error.message
    return ""


def _print(document: Mapping[str, Any]) -> None:
    from trimtab.cli.output import console, table, text_bytes, text_count

    to = console()
    facts = table("", ["", ""])
    facts.show_header = False

    def fact(name: str, *values: Any) -> None:
        for index, value in enumerate(values):
            facts.add_row(name if index == 0 else "", str(value))

    if document["kind"] == "artifact":
        fact("artifact", f"{document['model']}, {text_bytes(document['bytes'])}, schema {document['schema']}")
        fact("name", document["name"] or "none")
    else:
        fact("model", document["model"])
    fact("inputs", *document["inputs"])
    fact("outputs", *document["outputs"])
    fact("sizes", *(document["symbols"] or ["all fixed"]))
    if "macs" in document:
        at = ", ".join(f"{name}={size}" for name, size in document["sizes"].items())
        fact("MACs", text_count(document["macs"]) + (f" at {at}" if at else ""))
        fact("parameters", text_count(document["parameters"]))
        peak = text_bytes(document["activation_peak_bytes"])
        fact("activations", f"{peak} at most at one time" + (f", at {at}" if at else ""))
    fact("weights", f"{document['weights']} tensors, {text_bytes(document['weight_bytes'])}")
    if document["kind"] == "artifact":
        fact("precision", document["precision"])
        fact("pipeline", document["pipeline"] or "none")
        fact("applied", ", ".join(dict.fromkeys(document["passes_applied"])) or "no pass changed the module")
        for variant in document["variants"]:
            fact("code", f"{variant['target']}, {variant['backend']} backend")
            fact("needs", " ".join(variant["features"]) or "no CPU feature beyond the architecture")
            runtime = "in the file" if variant["runtime_in_file"] else "not in the file"
            fact("runtime", f"{runtime}; {_pairs(variant['requires'])}")
            fact("runs here", "yes" if variant["runs_here"] else f"no: {variant['refusal']}")
        at = ", ".join(f"{name}={size}" for name, size in document["memory_sizes"].items())
        for name, count in document["memory_bytes"].items():
            varies = not isinstance(document["memory"][name], int)
            fact(name.replace("_", " "), text_bytes(count) + (f" at {at}" if varies else ""))
        fact("built with", _pairs(document["versions"]))
    to.print(facts)
    if "ops" in document:
        kinds = table(f"{document['op_count']} ops", ["op", "count", "MACs"], ["count", "MACs"])
        for row in document["ops"]:
            kinds.add_row(row["op"], str(row["count"]), text_count(row["macs"]) if row["macs"] else "")
        to.print(kinds)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
