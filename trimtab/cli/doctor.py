"""``trimtab doctor``: what works on this machine, and for what does not, why and what to install."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from trimtab.cli.command_options import DebugOption, JsonOption


def doctor_command(
    quick: Annotated[bool, typer.Option("--quick", help="Do not compile a tiny model as a trial.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show Python, packages, processor, backends and targets; compile a tiny model. Exit code 1 if that fails."""
    from trimtab import __version__
    from trimtab.cli import machine_state
    from trimtab.cli.progress import progress_bar

    with progress_bar("doctor") as update:
        update("look at packages", 0.0)
        document: dict[str, Any] = {
            "trimtab": __version__,
            "python": machine_state.python_facts(),
            "packages": machine_state.package_facts(),
            "processor": machine_state.processor_facts(),
            "linker": machine_state.linker_fact(),
        }
        update("ask the backends", 0.1)
        document["backends"] = machine_state.backend_facts()
        document["trial"] = None
        working = [backend["name"] for backend in document["backends"] if backend["works"]]
        if not quick and working:
            update("compile a tiny model", 0.3)
            document["trial"] = machine_state.trial_compilation(working[0])
    if json:
        from trimtab.cli.output import print_json

        print_json(document)
    else:
        _print(document)
    if document["trial"] is not None and not document["trial"]["works"]:
        raise typer.Exit(1)


_WITHOUT_INSTRUCTION = {
    "bf16": "operands are widened to float32 and multiplied there, which is right, saves memory and is no faster",
    "int8": "operands are widened to int16 or int32 and multiplied there, which is right and slower",
}


def _products(kind: str, features: Sequence[str] | None) -> str:
    """Which instructions multiply numbers of a narrow kind, or what is done without."""
    if features is None:
        return "unknown, because this system does not tell the features of its processor"
    return ", ".join(features) if features else f"no instruction; {_WITHOUT_INSTRUCTION[kind]}"


def _print(document: Mapping[str, Any]) -> None:
    from trimtab.cli.output import console, table, text_seconds

    to = console()
    python, processor = document["python"], document["processor"]
    to.print(f"Trimtab {document['trimtab']}, Python {python['version']} ({python['executable']})")
    to.print(f"{python['platform']}")
    level = processor["level"] or "unknown level"
    to.print(
        f"{processor['model']}: {processor['architecture']}, {level}, "
        f"{processor['usable_cores']} of {processor['cores']} cores usable"
    )
    for kind, features in processor["products"].items():
        to.print(f"{kind} products: {_products(kind, features)}")
    to.print(f"linker: {document['linker'] or 'none; install a C compiler, e.g. apt-get install gcc'}")
    packages = table("Packages", ["package", "version", "used for", "to get it"])
    for row in document["packages"]:
        packages.add_row(
            row["package"], row["version"] or "missing", row["used_for"], "" if row["version"] else row["install"]
        )
    to.print(packages)
    backends = table("Backends and targets", ["backend", "target", "compiles here", "runs here", "what is missing"])
    for backend in document["backends"]:
        if not backend["works"]:
            backends.add_row(backend["name"], "", "no", "", f"{backend['reason']}: {backend['fix']}")
            continue
        for target in backend["targets"]:
            missing = backend["foreign_targets"].get(target)
            runs = "no" if missing else "yes"
            backends.add_row(backend["name"], target, "yes", runs, f"to run: {missing}" if missing else "")
        for target, missing in backend["missing_targets"].items():
            backends.add_row(backend["name"], target, "no", "", f"to compile: {missing}")
    to.print(backends)
    trial = document["trial"]
    if trial is None:
        to.print("trial: skipped")
    elif trial["works"]:
        to.print(f"trial: a tiny model was compiled for this machine and runs ({text_seconds(trial['seconds'])})")
    else:
        to.print(f"trial: FAILED\n{trial['message']}")
