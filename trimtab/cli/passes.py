"""``trimtab passes``: which passes there are, and what each one does, promises and takes."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from trimtab.cli.command_options import DebugOption, JsonOption


def passes_command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Show the documentation of this pass or group.", show_default=False),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the passes and groups that a pipeline may name, or show one of them in full."""
    from trimtab.cli.output import print_json

    if name is None:
        document: dict[str, Any] = {"groups": _groups(), "passes": _passes()}
        if json:
            print_json(document)
        else:
            _print_list(document)
        return
    document = _one(name)
    if json:
        print_json(document)
    else:
        _print_one(document)


def _groups() -> list[dict[str, Any]]:
    from trimtab.passes.pipeline import group_names

    return [_group(name) for name in group_names()]


def _group(name: str) -> dict[str, Any]:
    from trimtab.passes.pipeline import load_group

    group = load_group(name)
    return {
        "name": group.name,
        "summary": group.summary,
        "passes": [str(item) for item in group.items],
        "rounds": group.rounds,
    }


def _passes() -> list[dict[str, Any]]:
    from trimtab.passes.registry import pass_names

    return [_pass(name) for name in sorted(pass_names())]


def _pass(name: str) -> dict[str, Any]:
    """What a pass declares. A broken pass of another package is listed with its error: it must not hide the rest."""
    from trimtab.errors import PassError
    from trimtab.passes.options import describe_options
    from trimtab.passes.registry import load_pass, provider

    try:
        cls = load_pass(name)
    except PassError as error:
        return {"name": name, "error": error.to_dict()}
    return {
        **cls.declaration(),
        "provider": provider(name),
        "options": describe_options(cls),
        "documentation": inspect.getdoc(cls) or "",
    }


def _one(name: str) -> dict[str, Any]:
    from trimtab.errors import UsageError
    from trimtab.passes.options import did_you_mean
    from trimtab.passes.pipeline import group_names
    from trimtab.passes.registry import load_pass, pass_names

    if name in group_names():
        return _group(name)
    if name not in pass_names():
        known = [*group_names(), *sorted(pass_names())]
        raise UsageError(f"there is no pass {name}", values={"known": ", ".join(known)}, fix=did_you_mean(name, known))
    load_pass(name)  # raises when its package is broken
    return _pass(name)


def _print_list(document: dict[str, Any]) -> None:
    from trimtab.cli.output import console, table

    groups = table("Groups", ["name", "runs", "what it does"])
    for group in document["groups"]:
        groups.add_row(group["name"], ",".join(group["passes"]), group["summary"])
    passes = table("Passes", ["name", "contract", "options", "what it does"])
    for pass_ in document["passes"]:
        if "error" in pass_:
            passes.add_row(pass_["name"], "", "", f"broken: {pass_['error']['what']}")
            continue
        options = ", ".join(f"{option['name']}={option['default']}" for option in pass_["options"])
        passes.add_row(pass_["name"], pass_["contract"], options, pass_["summary"])
    to = console()
    to.print(groups)
    to.print(passes)
    to.print("trimtab passes NAME shows one in full. A pipeline is a list such as cleanup,fuse")


def _print_one(document: dict[str, Any]) -> None:
    from trimtab.cli.output import console, table

    to = console()
    to.print(document["name"], style="bold")
    if "rounds" in document:
        to.print(document["summary"])
        rounds = f"; at most {document['rounds']} rounds, until nothing changes" if document["rounds"] > 1 else ""
        to.print(f"runs: {', '.join(document['passes'])}{rounds}")
        return
    to.print(document["documentation"])
    to.print()
    to.print(f"contract:  {document['contract']}")
    for key in ("requires", "establishes", "breaks"):
        if document[key]:
            to.print(f"{key}: {', '.join(document[key])}")
    if document["grows_weights"]:
        to.print("may increase the unique weight bytes")
    to.print(f"from:      {document['provider']}")
    if document["options"]:
        options = table("Options", ["name", "type", "default"])
        for option in document["options"]:
            options.add_row(option["name"], option["type"], str(option["default"]))
        to.print(options)
    else:
        to.print("options:   none")
