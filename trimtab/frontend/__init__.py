"""Frontends: how models come in. Each one turns a foreign program into a :class:`trimtab.ir.Module`."""
