"""Trimtab: a compiler for transformer inference."""
