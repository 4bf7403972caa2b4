"""A mixture of experts (arXiv:1701.06538) in place of the MLP: of many small SwiGLUs each token goes through a few.

A router scores the experts for each token. The best k compute, and their results are added, weighted by their shares of
the scores. So a token reads and multiplies k experts' weights, while the model knows what all of them have learned.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rowint8.baseline_engine.config_file import ExpertsConfig
from rowint8.baseline_engine.layers import Int8Linear, Place, WeightFormat, copy_into
from rowint8.kernels import ops


class MixtureOfExperts(nn.Module):
    """x [T, hidden] -> sum over a token's experts e of share(e) * down_e(silu(gate_e(x)) * up_e(x)).

    The experts' rows are stacked in one layer, as q, k and v are: those of expert 0 on top, its gate over its up.
    """

    router: Tensor

    def __init__(self, config: ExpertsConfig, hidden_size: int, weight_format: WeightFormat):
        super().__init__()
        self.config, self.hidden_size, count = config, hidden_size, config.count
        router = torch.empty(count, hidden_size, dtype=weight_format.dtype, device=weight_format.device)
        self.register_buffer("router", router)
        self.gate_up = weight_format.linear(hidden_size, 2 * count * config.intermediate_size, bias=False)
        self.down = weight_format.linear(config.intermediate_size, count * hidden_size, bias=False)

    def places(self, prefix: str) -> dict[str, Place]:
        prefix, (gate, up, down) = f"{prefix}.{self.config.block}", self.config.parts
        names = [f"{prefix}.experts.{expert}" for expert in range(self.config.count)]
        gate_up = {f"{name}.{part}": self.config.intermediate_size for name in names for part in (gate, up)}
        return (
            {f"{prefix}.gate.weight": copy_into(self.router, f"{prefix}.gate.weight")}
            | self.gate_up.places(gate_up)
            | self.down.places({f"{name}.{down}": self.hidden_size for name in names})
        )

    def forward(self, x: Tensor) -> Tensor:
        shares, ids = F.linear(x, self.router).float().softmax(-1).topk(self.config.topk)
        if self.config.normalized:
            shares = shares / shares.sum(-1, keepdim=True)
        return self._int8(x, shares, ids) if isinstance(self.gate_up, Int8Linear) else self._plain(x, shares, ids)

    def int8_weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the operators take: values [E, N, K] and scale [E, N] of gate_up and of down."""
        layers, count = (self.gate_up, self.down), self.config.count
        gate_up, down = ((w.values.unflatten(0, (count, -1)), w.scale.unflatten(0, (count, -1))) for w in layers)  # type: ignore
        return *gate_up, *down

    def blocks(self) -> tuple[int, int] | None:
        """Rotated blocks of gate_up's and of down's columns; None where tokens stay as they are."""
        layers: Any = (self.gate_up, self.down)
        gate_up, down = (layer.block for layer in layers)
        return gate_up and (gate_up, down)

    def _int8(self, x: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
        given = *self.int8_weights(), shares, ids.int()  # int32 is what the warm-up compiles for
        blocks = self.blocks()
        return ops.experts_int8(x, *given, None, *blocks) if blocks else ops.experts(x, *given)

    def _plain(self, x: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
        """Sorts pairs of a token and an expert by expert, multiplies each expert's at once, and sorts back."""
        count, topk = self.config.count, self.config.topk
        experts = ids.flatten()
        order = experts.argsort(stable=True)
        ends = (experts[:, None] == torch.arange(count, device=x.device)).sum(0).cumsum(0).to(torch.int32)
        gate_up, down = (layer.weight.unflatten(0, (count, -1)).mT for layer in (self.gate_up, self.down))
        gate, up = F.grouped_mm(x[order // topk], gate_up, offs=ends).chunk(2, dim=-1)
        results = F.grouped_mm(F.silu(gate) * up, down, offs=ends)
        weighted = torch.empty_like(results).index_copy(0, order, results).unflatten(0, (-1, topk)) * shares[..., None]
        return weighted.sum(1).to(x.dtype)
