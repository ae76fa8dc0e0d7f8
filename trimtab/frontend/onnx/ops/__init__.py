"""Handlers of the ONNX operators, one file a family."""

FAMILIES = (
    "activation", "arithmetic", "attention", "contraction", "contrib", "convolution", "creation", "elementwise",
    "gathering", "integer_products", "normalization", "pooling", "quantization", "reduction", "reshaping", "resizing",
    "scattering", "slicing",
)  # fmt: skip
"""The modules of this package whose import registers handlers."""
