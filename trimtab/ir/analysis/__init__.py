"""Facts about modules that are computed, never stored: cost, liveness, counts, and a view for graph algorithms."""

from trimtab.ir.analysis.cost import ModuleCost, OpCost, module_cost
from trimtab.ir.analysis.graph_view import ENTRY, EXIT, graph_view
from trimtab.ir.analysis.liveness import LiveInterval, Liveness
from trimtab.ir.analysis.statistics import count_ops, executions

__all__ = [
    "ENTRY", "EXIT", "LiveInterval", "Liveness", "ModuleCost", "OpCost", "count_ops", "executions", "graph_view",
    "module_cost",
]  # fmt: skip
