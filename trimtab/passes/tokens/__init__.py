"""Algorithms that make token sequences shorter, as functions that append IR ops to a graph; the passes call them.

Shapes: x ``[B, N, C]`` are tokens, B may be symbolic, N is a number. The first ``protected`` tokens (class,
distillation and register tokens) are kept as they are, in front. Indices are i64.
"""
