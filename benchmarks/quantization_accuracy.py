"""What quantization costs in accuracy: a vision transformer trained on digits, and sentence embeddings of MiniLM."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import trimtab
from token_digits import DigitsModel
from token_text import embeddings, find_sentences, tokenized, traced_embedding
from trimtab import TrimtabError

DIGITS = (
    "quantize",
    "quantize{factors=false}",
    "smooth,quantize{factors=false}",
    "quantize{inputs=row}",
    "quantize{bits=6}",
    "quantize{bits=6,feedback=true}",
    "quantize{bits=4,input_bits=8}",
    "quantize{bits=4,input_bits=8,feedback=true}",
    "quantize-weights{bits=4,group=16,method=gptq}",
    "quantize{bits=4}",
    "reparameterize-scales,quantize{bits=4,observer=mse}",
    "quantize{bits=4,feedback=true}",
    "quantize{bits=4,feedback=true},compensate",
    "reparameterize-scales,quantize{bits=4,observer=mse},compensate",
)
"""Pipelines behind `cleanup,fuse`."""
TEXT = (
    "quantize",
    "quantize{factors=false}",
    "smooth,quantize{factors=false}",
    "quantize{inputs=row}",
    "quantize-weights{bits=4,group=32}",
    "quantize-weights{bits=4,group=32,method=awq}",
    "quantize-weights{bits=4,group=32,method=gptq}",
    "quantize-weights{bits=4,group=32,method=gptq,symmetric=false}",
    "quantize-weights{bits=3,group=32,method=gptq}",
)
SENTENCES = 200
_BATCH, _BATCHES = 64, 3
"""Of calibration."""


def digits_lines(pipelines: tuple[str, ...] = DIGITS, epochs: int | None = None) -> Iterator[str]:
    """Accuracy on the held-out digits."""
    model = DigitsModel(*(() if epochs is None else (epochs,)))
    images = torch.from_numpy(model.digits.train_images[: _BATCH * _BATCHES])
    batches = [(batch,) for batch in images.split(_BATCH)]
    yield f"digits, {len(model.digits.held_out_labels)} held out: {model.accuracy:.2%} in float"
    yield f"{'accuracy':>9s} {'lost':>6s}  pipeline"
    for pipeline in pipelines:
        try:
            made = trimtab.optimize(model.module, f"fuse,{pipeline}", calibration=batches, check="never").module
            found = model.accuracy_of(made)
        except TrimtabError as error:
            yield f"{'':9s} {'':6s}  {pipeline}: {str(error).splitlines()[0]}"
        else:
            yield f"{found:9.2%} {100 * (model.accuracy - found):6.2f}  {pipeline}"


def text_lines(pipelines: tuple[str, ...] = TEXT, sentences: int = SENTENCES) -> Iterator[str]:
    """Mean and least cosine of the embeddings; the sentences to calibrate on are others."""
    ids, mask = tokenized(find_sentences(), sentences + _BATCH * _BATCHES, 12)
    module = traced_embedding()
    batches = list(zip(ids[sentences:].split(_BATCH), mask[sentences:].split(_BATCH), strict=True))
    ids, mask = ids[:sentences], mask[:sentences]
    wanted = embeddings(module, ids, mask)
    yield f"MiniLM, {len(ids)} sentences of up to {ids.shape[1]} tokens: cosine to the float model's embedding"
    yield f"{'mean':>7s} {'least':>7s}  pipeline"
    for pipeline in pipelines:
        try:
            made = trimtab.optimize(module, f"fuse,{pipeline}", calibration=batches, check="never").module
        except TrimtabError as error:
            yield f"{'':7s} {'':7s}  {pipeline}: {str(error).splitlines()[0]}"
        else:
            cosines = F.cosine_similarity(embeddings(made, ids, mask), wanted, dim=-1)
            yield f"{float(cosines.mean()):7.4f} {float(cosines.min()):7.4f}  {pipeline}"
