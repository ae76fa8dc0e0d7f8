"""The PyTorch frontend: ``torch.export``, before decomposition, to whole ops."""

from trimtab.frontend.torch_export.trace import import_program, trace

__all__ = ["import_program", "trace"]
