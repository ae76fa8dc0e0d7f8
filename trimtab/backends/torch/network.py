"""A module as a ``torch.nn.Module``: its forward pass is the interpreter's, with parameters in place of weights.

The reference of every op is written in torch, so gradients need no rules of ours::

    network = trimtab.to_torch(module)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    ...
    trimtab.update(module, network)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.ir.core import Module
from trimtab.ir.interpreter import interpret
from trimtab.ir.weights import Weight


class Network(nn.Module):
    """What :func:`to_torch` returns; called with the module's inputs, in order or by name.

    Returns one tensor, or a tuple when the module has several outputs.  Parameters and buffers have the ids of the
    weights as their names, as far as torch allows them (``state_dict`` of a traced model and of its network have the
    same keys while no pass has replaced the weights).  ``network.double()`` and the like compute in that type; inputs
    keep the types that the module declares, and floating outputs have the type computed in.
    """

    def __init__(self, module: Module) -> None:
        super().__init__()
        self._module = module.copy()
        self._names = {id: _register(self, weight) for id, weight in self._module.weights.items()}

    def extra_repr(self) -> str:
        return repr(self._module)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Evaluate the module.

        Raises:
            InputError: wrong number, names, dtypes or shapes of inputs.
            UsageError: inputs both in order and by name.
        """
        if inputs and named:
            raise UsageError(
                "inputs are given both in order and by name",
                values={"in order": len(inputs), "by name": sorted(named)},
                fix="give all of them one way",
            )
        weights = self.weights()
        device = next((tensor.device for tensor in weights.values()), torch.device("cpu"))
        with device:  # constants that references make belong beside the weights
            outputs = interpret(
                self._module,
                named or inputs,
                precision=self._precision(),
                weights=weights,
                grad=torch.is_grad_enabled(),
            )
        return outputs[0] if len(outputs) == 1 else outputs

    def weights(self) -> dict[str, Tensor]:
        """The parameters and buffers by id of their weight."""
        tensors: dict[str, Tensor] = dict(self.named_parameters(remove_duplicate=False))
        tensors.update(self.named_buffers(remove_duplicate=False))
        return {id: tensors[name] for id, name in self._names.items()}

    def _precision(self) -> torch.dtype | None:
        """The type that the user has converted all floating parameters to; None while they are as declared."""
        declared = self._module.weights
        changed = {
            parameter.dtype
            for id, parameter in self.weights().items()
            if declared[id].trainable and parameter.dtype is not declared[id].type.dtype.to_torch()
        }
        return changed.pop() if len(changed) == 1 else None


def to_torch(module: Module) -> Network:
    """A ``torch.nn.Module`` that computes what ``module`` computes, with gradients.

    Trainable weights become parameters, copied; the others become buffers that share memory with the module, which
    must not be written.  Later changes of ``module`` do not reach the network; :func:`update` takes trained weights
    back.  Each op runs as its reference does, one by one: right and differentiable, not fast.

    Args:
        module: the module, as traced, imported or optimized.
    """
    return Network(module)


def update(module: Module, network: Network) -> None:
    """Take the weights of ``network``, trained since, back into ``module``, in place.

    Weights whose values have not changed keep their storage.  Values are rounded to the weight's own type.

    Args:
        module: the module that ``network`` was made from, or one with the same weights.
        network: what :func:`to_torch` returned.

    Raises:
        UsageError: the two have different weights, or a trained weight is not finite.
    """
    trained = _checked(module, network)
    for id, tensor in trained.items():
        old = module.weights[id]
        new = tensor.to("cpu", old.type.dtype.to_torch())
        if not torch.equal(old.tensor(), new):
            module.weights[id] = Weight.from_tensor(id, new.clone(), trainable=old.trainable)


def _checked(module: Module, network: Network) -> dict[str, Tensor]:
    if not isinstance(network, Network):
        raise UsageError(
            "the network was not made by trimtab.to_torch",
            values={"given": type(network).__name__},
            fix="pass what to_torch returned, not a wrapper of it",
        )
    tensors = {id: tensor.detach() for id, tensor in network.weights().items()}
    given = {id: tuple(tensor.shape) for id, tensor in tensors.items()}
    wanted = {id: weight.type.shape for id, weight in module.weights.items()}
    if given != wanted:
        differing = sorted(id for id in given.keys() | wanted.keys() if given.get(id) != wanted.get(id))
        raise UsageError(
            "the network and the module have different weights",
            values={"differing": len(differing), "first": differing[0], "network": given.get(differing[0]),
                    "module": wanted.get(differing[0])},
            rule="weights go back by id, and passes that ran since may have replaced some",
            fix="make the network from the module that is to be updated",
        )  # fmt: skip
    for id, tensor in tensors.items():
        if module.weights[id].trainable and not bool(torch.isfinite(tensor).all()):
            raise UsageError(
                "a trained weight is not finite",
                values={"weight": id, "elements": int((~torch.isfinite(tensor)).sum())},
                rule="the training has diverged",
                fix="lower the learning rate, and update from the last good state",
            )
    return tensors


def _register(root: nn.Module, weight: Weight) -> str:
    """Give ``root`` the weight as a parameter or buffer, in modules named like the parts of its id; return its name."""
    owner, path = root, []
    *parts, leaf = weight.id.split(".")
    for part in parts:
        name = part
        while not name or (hasattr(owner, name) and not isinstance(getattr(owner, name), _Scope)):
            name += "_"
        if not hasattr(owner, name):
            owner.add_module(name, _Scope())
        owner = getattr(owner, name)
        path.append(name)
    while not leaf or hasattr(owner, leaf):
        leaf += "_"
    if weight.trainable:
        owner.register_parameter(leaf, nn.Parameter(weight.tensor().detach().clone()))
    else:
        owner.register_buffer(leaf, weight.tensor())
    return ".".join([*path, leaf])


class _Scope(nn.Module):
    """A level of names without a forward pass of its own."""
