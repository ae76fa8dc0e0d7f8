"""The torch backend: a module of the IR as a ``torch.nn.Module`` that can be trained, and its weights back."""

from trimtab.backends.torch.network import Network, to_torch, update

__all__ = ["Network", "to_torch", "update"]
