"""Collects everything in a model that cannot be imported, to report it all at once."""

from __future__ import annotations

from trimtab.errors import UnsupportedOpError


class UnsupportedOps:
    """The refusals met so far, by operator."""

    def __init__(self) -> None:
        self._errors: dict[tuple[str, str], list[UnsupportedOpError]] = {}

    def add(self, op: str, error: UnsupportedOpError) -> None:
        self._errors.setdefault((op, error.what), []).append(error)

    def raise_if_any(self) -> None:
        """Raise one error for all refusals.

        Raises:
            UnsupportedOpError: names every operator with how often it occurs, where first, and what to do.
        """
        if not self._errors:
            return
        groups = list(self._errors.values())
        if len(groups) == 1 and len(groups[0]) == 1:
            raise groups[0][0]
        fixes = dict.fromkeys(error.fix for (error, *_) in groups if error.fix)
        raise UnsupportedOpError(
            f"the model uses {len(groups)} things that Trimtab does not import"
            if len(groups) > 1
            else groups[0][0].what,
            values={what: _summary(errors) for (_, what), errors in self._errors.items()},
            rule="; ".join(dict.fromkeys(error.rule for (error, *_) in groups if error.rule)),
            fix="; ".join(fixes),
            location=groups[0][0].location,
        )


def _summary(errors: list[UnsupportedOpError]) -> str:
    count = f"{len(errors)} nodes, first" if len(errors) > 1 else "1 node,"
    return f"{count} {errors[0].location or errors[0].where}"
