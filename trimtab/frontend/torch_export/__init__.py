"""The PyTorch frontend: ``torch.export``, before decomposition, to whole ops."""

from trimtab.frontend.torch_export import (  # noqa: F401  loading these fills the table of converters
    arithmetic,
    indexing,
    layers,
    quantization,
    reductions,
    shapes,
)
from trimtab.frontend.torch_export.trace import import_program, trace

__all__ = ["import_program", "trace"]
