"""What quantization costs in accuracy: a vision transformer trained on digits, and sentence embeddings of MiniLM."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

import trimtab
from token_digits import DigitsModel
from token_text import embeddings, find_sentences, tokenized, traced_embedding
from trimtab import TrimtabError

DIGITS = (
    "quantize",
    "smooth,quantize",
    "quantize{inputs=row}",
    "quantize{bits=6}",
    "reparameterize-scales,quantize{bits=6}",
    "quantize{bits=4,input_bits=8}",
    "quantize-weights{bits=4,group=16,method=gptq}",
    "quantize{bits=4}",
    "reparameterize-scales,quantize{bits=4,observer=mse}",
    "reparameterize-scales,quantize{bits=4,observer=mse},compensate",
)
"""Pipelines behind `cleanup,fuse`."""
TEXT = (
    "quantize",
    "smooth,quantize",
    "quantize{inputs=row}",
    "quantize-weights{bits=4,group=32}",
    "quantize-weights{bits=4,group=32,method=awq}",
    "quantize-weights{bits=4,group=32,method=gptq}",
    "quantize-weights{bits=3,group=32,method=gptq}",
)
SENTENCES = 200
_CALIBRATION = 64


def digits_lines(pipelines: tuple[str, ...] = DIGITS, epochs: int | None = None) -> Iterator[str]:
    """Accuracy on the held-out digits."""
    model = DigitsModel(*(() if epochs is None else (epochs,)))
    yield f"digits, {len(model.digits.held_out_labels)} held out: {model.accuracy:.2%} in float"
    yield f"{'accuracy':>9s} {'lost':>6s}  pipeline"
    for pipeline in pipelines:
        try:
            found = model.accuracy_of(model.reduce(f"fuse,{pipeline}"))
        except TrimtabError as error:
            yield f"{'':9s} {'':6s}  {pipeline}: {str(error).splitlines()[0]}"
        else:
            yield f"{found:9.2%} {100 * (model.accuracy - found):6.2f}  {pipeline}"


def text_lines(pipelines: tuple[str, ...] = TEXT, sentences: int = SENTENCES) -> Iterator[str]:
    """Mean and least cosine of the embeddings; the sentences to calibrate on are others."""
    ids, mask = tokenized(find_sentences(), sentences + _CALIBRATION, 12)
    module = traced_embedding()
    batches = [(ids[-_CALIBRATION:], mask[-_CALIBRATION:])]
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
