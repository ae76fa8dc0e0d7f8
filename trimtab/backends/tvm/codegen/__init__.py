"""Kernel generation: block-structured TIR functions in, loops out."""
