"""The intermediate representation: values, ops, graphs, types and modules, and everything that only needs them."""

from trimtab.ir.builder import Builder
from trimtab.ir.core import Graph, Module, Use, Value
from trimtab.ir.dims import Dim, DimExpr, Symbol, as_symbol, bounds, symbol
from trimtab.ir.dtypes import DType
from trimtab.ir.interpreter import interpret
from trimtab.ir.op import OP_CLASSES, Op
from trimtab.ir.parser import parse_module
from trimtab.ir.printer import print_graph, print_module
from trimtab.ir.types import TensorType
from trimtab.ir.verifier import verify
from trimtab.ir.weights import Weight

__all__ = [
    "OP_CLASSES", "Builder", "DType", "Dim", "DimExpr", "Graph", "Module", "Op", "Symbol", "TensorType", "Use", "Value",
    "Weight", "as_symbol", "bounds", "interpret", "parse_module", "print_graph", "print_module", "symbol", "verify",
]  # fmt: skip
