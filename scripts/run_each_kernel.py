"""Launches each kernel once on a small case with awkward sizes, for compute-sanitizer (`make sanitize`)."""

import torch

from rowint8.kernels import dispatch, ops
from rowint8.kernels.quantize import quantize_rowwise
from rowint8.kernels.tiles.card import card_of
from rowint8.kernels.tiles.hopper_cost import hopper_candidates

HIDDEN = 1040
weight = quantize_rowwise(torch.randn(336, HIDDEN, device="cuda"))
bias = torch.randn(336, device="cuda", dtype=torch.bfloat16)


def tokens(m: int) -> torch.Tensor:
    return torch.randn(m, HIDDEN, device="cuda", dtype=torch.bfloat16)


for m in (1, 5, 70, 300):
    print("linear and swiglu", m, flush=True)
    ops.linear(tokens(m), *weight, bias)
    ops.swiglu(tokens(m), *weight)
if card_of(bias.device).hopper_processors:
    for op in ("linear", "swiglu"):
        for tile in hopper_candidates(op, 1):
            print(op, tile, flush=True)
            dispatch.run(op, tokens(tile.width + 3), *weight, tile=tile)
for m in (3, 600):
    print("add_rms_norm", m, flush=True)
    ops.add_rms_norm(tokens(m), tokens(m), torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16), 1e-5)
torch.cuda.synchronize()
