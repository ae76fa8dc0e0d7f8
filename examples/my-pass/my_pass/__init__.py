"""Passes for Trimtab. Nothing is imported here: Trimtab imports a pass when a pipeline names it."""
