"""The pass merge-adapters: LoRA goes into the weight, and says why where it does not."""

from __future__ import annotations

import pytest
import torch

import trimtab
from trimtab.ir import Module
from trimtab.passes.manager import PassManager
from trimtab.passes.merge_adapters import MergeAdapter


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank adapter, as libraries for fine-tuning write it."""

    def __init__(self, bias: bool, scale: float, twice: bool = False) -> None:
        super().__init__()
        self.base = torch.nn.Linear(24, 16, bias=bias)
        self.down = torch.nn.Linear(24, 4, bias=False)
        self.up = torch.nn.Linear(4, 16, bias=False)
        self.scale, self.twice = scale, twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x) + self.up(self.down(x)) * self.scale
        return y + self.base(x + 1) if self.twice else y


def traced(model: torch.nn.Module) -> Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    batch = torch.export.Dim("batch", min=1, max=64)
    return trimtab.trace(model.eval(), (torch.randn(3, 5, 24),), dynamic_shapes={"x": {0: batch}})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.25, -2.0])
def test_an_adapter_is_merged(bias: bool, scale: float) -> None:
    module = traced(Adapted(bias, scale))
    result, report = PassManager("merge-adapters,dce").run(module)  # checks the contract
    assert [op.name for op in result.walk()] == ["linear"]
    assert report.rows[0].rules[0]["applied"] == 1
    assert result.weight_bytes == module.weight_bytes - 4 * (4 * 24 + 16 * 4)
    assert PassManager("merge-adapters").run(result)[1].applied == []


def test_a_weight_that_is_read_elsewhere_keeps_its_adapter() -> None:
    module = traced(Adapted(True, 0.5, twice=True))
    assert PassManager("merge-adapters").run(module)[1].applied == []
    assert MergeAdapter().explain(module).reason == "@base.weight is read at 2 places, which differ afterwards"


def test_an_adapter_of_another_input_is_none() -> None:
    class Other(Adapted):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.up(self.down(x + 1))

    module = traced(Other(True, 1.0))
    assert PassManager("merge-adapters").run(module)[1].applied == []
    assert MergeAdapter().explain(module).reason == "an add is not the value that x was before"
