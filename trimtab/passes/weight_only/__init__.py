"""Quantization of the weights of linear layers alone, as functions that the passes share; activations stay in float.

Shapes: a weight is W ``[N, K]``, its input X ``[rows, K]``, and the layer's error for other weights W' is
``|X (W' - W)^T|^2 = tr(D H D^T)`` with ``D = W' - W`` and ``H = X^T X``.
"""
