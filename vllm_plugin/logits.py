"""A warning for logits that are NaN: vLLM draws token 0 from them, for ever, and says nothing."""

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from rowint8.vllm_plugin import attached

logger = init_logger(f"vllm.{__name__}")

EVERY = 8
"""Steps between two looks. NaN stays in a request to its end, and a look costs two launches on a GPU."""


class LogitsWatch:
    """Looks at a model's logits and warns once if any are NaN. It never waits for the GPU: a look is read at the next.

    Args:
        dtype: of the activations.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.calls = 0
        self.warned = False
        self.found: Tensor | None = None

    def install(self, model: Any) -> None:
        """Makes `compute_logits` of the model, where it has one, show its result to this watch."""
        compute: Any = getattr(model, "compute_logits", None)
        if compute is None:
            return

        @wraps(compute)
        def compute_logits(*args: Any, **options: Any) -> Any:
            logits = compute(*args, **options)
            if isinstance(logits, Tensor) and not self.warned:
                self.look(logits)
            return logits

        attached.set_function(model, "compute_logits", compute_logits)

    def look(self, logits: Tensor) -> None:
        """Looks at the logits [tokens, vocabulary] of one call in `EVERY`. NaN activations make all of a row NaN."""
        if logits.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if self.calls % EVERY == 0:
            self._read()
            found = logits[:, 0].isnan().any()
            if not logits.is_cuda:
                self.found = found
                self._read()
            else:
                self.found = torch.zeros((), dtype=torch.bool, pin_memory=True).copy_(found, non_blocking=True)
        self.calls += 1

    def _read(self) -> None:
        if self.found is not None and bool(self.found):
            self.warned = True
            logger.warning("rowint8: logits are NaN, so the tokens mean nothing; %s", self._advice())

    def _advice(self) -> str:
        counted = "VLLM_COMPUTE_NANS_IN_LOGITS=1 counts such requests"
        if self.dtype == torch.float16:
            return f"float16 ends at 65504, --dtype bfloat16 and float32 do not; {counted}"
        return f"the checkpoint or its config.json is at fault, not the dtype {self.dtype}; {counted}"
