"""The reference page of the op set, generated from the declarations: ``python -m trimtab.ir.reference_page``."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from types import ModuleType

from trimtab.ir.attributes import print_attribute
from trimtab.ir.dims import Dim
from trimtab.ir.dtypes import DType
from trimtab.ir.op import OP_CLASSES, Op

PAGE = "docs/ir-reference.md"

_HEAD = """\
# IR reference

Every op of the IR, taken from its declaration. Written by
`python -m trimtab.ir.reference_page > {page}`; do not edit. What modules, graphs, values, weights and
dimensions are is in [concepts.md](concepts.md).

An op stands in the text of a module as

```text
%y = softmax(%x) {{dim=1}} : f32[batch, 10]
```

results, mnemonic, operands, attributes that do not hold their default, and the types of the results. Optional operands
that are absent read `none`, or are left out at the end; an operand of variable number is a list `[%a, %b]`.

The *reference*, a function of torch tensors, is the only definition of what an op computes: evaluation, gradients, type
inference and the tests of every backend use it. *Elementwise* means that each result element depends only on the
(broadcast) operand elements at the same index; *commutative*, that the first two operands may be exchanged.

{count} ops in {families} families:

"""

_KINDS = {"one": "", "optional": ", optional", "many": ", any number"}


def reference_page() -> str:
    """The whole page as Markdown."""
    import trimtab.ir.ops  # noqa: F401  the import declares all ops

    families: dict[str, list[type[Op]]] = {}
    for cls in OP_CLASSES.values():
        if cls.__module__.startswith("trimtab.ir.ops."):
            families.setdefault(cls.__module__, []).append(cls)
    count = sum(map(len, families.values()))
    parts = [_HEAD.format(page=PAGE, count=count, families=len(families))]
    for family in sorted(families):
        names = ", ".join(f"[{cls.name}](#{cls.name})" for cls in families[family])
        parts.append(f"- **{_title(family)}**: {names}\n")
    for family in sorted(families):
        parts.append(f"\n## {_title(family)}\n\n{_text(sys.modules[family])}\n")
        parts += [_entry(cls) for cls in families[family]]
    return "".join(parts)


def _title(family: str) -> str:
    return family.rsplit(".", 1)[1].replace("_", " ").capitalize()


def _entry(cls: type[Op]) -> str:
    lines = [f"\n### {cls.name}\n", _text(cls), ""]
    notes = [word for word, holds in (("elementwise", cls.elementwise), ("commutative", cls.commutative)) if holds]
    lines.append(f"`{_signature(cls)}`" + (f" · {', '.join(notes)}" if notes else ""))
    if cls.attribute_fields:
        lines += ["", "| attribute | type | default |", "|---|---|---|"]
        lines += [f"| `{name}` | {type} | {default} |" for name, type, default in _attributes(cls)]
    source = textwrap.dedent(inspect.getsource(cls.reference)).replace("@staticmethod\n", "")
    lines += ["", "```py", re.sub(r"  # (type: ignore|fmt: skip|noqa).*", "", source).rstrip(), "```", ""]
    return "\n".join(lines)


def _signature(cls: type[Op]) -> str:
    operands = [field.name + _KINDS[field.kind] for field in cls.operand_fields]
    regions = [f"{name}, region" for name in cls.region_fields]
    return f"{cls.__name__}({'; '.join(operands + regions)}) -> {_results(cls)}"


def _results(cls: type[Op]) -> str:
    """How many results the reference gives, from its annotation."""
    returned = str(inspect.signature(cls.reference).return_annotation)
    if returned == "Tensor":
        return "result"
    fixed = returned.startswith("tuple[") and "..." not in returned
    return f"{returned.count('Tensor')} results" if fixed else "results"


def _attributes(cls: type[Op]) -> Iterator[tuple[str, str, str]]:
    hints = typing.get_type_hints(cls)
    for name, field in cls.attribute_fields.items():
        default = "required" if field.is_required else f"`{print_attribute(field.default)}`"
        yield name, _type_text(hints[name]), default


def _type_text(declared: typing.Any) -> str:
    if declared == Dim:
        return "dimension"
    origin, args = typing.get_origin(declared), typing.get_args(declared)
    if origin is typing.Literal:
        return " or ".join(f"`{print_attribute(arg)}`" for arg in args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"list of {_type_text(args[0])}"
        return f"{len(args)} of {_type_text(args[0])}"
    if args:
        return " or ".join(map(_type_text, args))
    if declared is type(None):
        return "`none`"
    return "dtype" if declared is DType else str(declared.__name__)


def _text(owner: type[Op] | ModuleType) -> str:
    """The docstring as Markdown."""
    text = inspect.cleandoc(owner.__doc__ or "")
    text = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    return text.replace(".  ", ". ")


if __name__ == "__main__":
    sys.stdout.write(reference_page())
