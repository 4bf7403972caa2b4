"""What part of a decode step a kernel or an operator belongs to, told by its name, and how long the part took.

On CUDA the parts are made of kernels, those inside CUDA graphs included. Kernels may overlap (a dependent launch starts
while the one before it still runs): a moment counts for the kernel that began first, so the parts add up to the time in
which any kernel ran, and what is left of a step is the device's idle time. On the CPU they are made of the operators'
own time; an operator inside another one belongs to that one's part.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rowint8.eval.results.schema import PARTS

_KERNELS = {
    "attention": r"(?<!reshape_and_cache_)flash|fmha|attention|attn|sdpa",
    "sampling": r"maxops|arg_?max|top_?[kp]|sort|softmax|multinomial|cumsum|scan|searchsorted|sampl",
    "matmul": r"nvjet|gemm|gemv|matmul|splitkreduce|cutlass|marlin|machete|^triton_tem|^triton_(red|per)_.*_(add)?mm_",
    "norm": r"norm|rsqrt",
    "copies": r"memcpy|memset|copy_kernel|gather|index_?select|catarray",
    "elementwise": r"elementwise|^triton_|act_and_mul|silu|rotary|reshape_and_cache|reduce_kernel|index",
}
_OURS = {
    "matmul": r"^(one_token|few_tokens|many_tokens|hopper|int8|count|sort|grouped|pairs_gate_up|pairs_down|sum)_kernel",
    "norm": r"^_int8_tokens_kernel",
}
"""This project's kernels whose names would say something else or nothing: products, those of experts with their
routing, and the rounding of tokens, which a norm may be fused into."""
_COMPILED = "CompiledFxGraph"
"""In the name of what torch.compile fused on the CPU, norms among it: elementwise, as nothing in the name says more."""
_OPERATORS = {
    "attention": r"scaled_dot_product|attention",
    "sampling": r"argmax|aten::max$|topk|sort|softmax|cumsum|searchsorted|multinomial",
    "matmul": r"^rowint8::(linear|swiglu)|(::|_)(linear|matmul|mm|addmm|bmm)$|_linear_pointwise",
    "norm": r"norm|^rowint8::quantize_tokens$",
    "copies": r"aten::(to|copy_|_to_copy|clone|contiguous|cat|embedding|index_select|index|gather)$",
    "elementwise": r"aten::(add|sub|mul|div|addcmul|silu|sin|cos|neg|roll|where|pow|amax|sum|index_copy"
    r"|index_put|masked_fill|ge|gt|le|lt|clamp|bitwise_and|bitwise_not|zeros_like|fill)_?$",
}


class Interval(NamedTuple):
    """One run of a kernel, a copy or a fill on the device."""

    name: str
    start: float
    """Microseconds, as is `end`."""
    end: float


class Work(NamedTuple):
    """Time that counts for one name alone."""

    part: str
    name: str
    us: float


def kernel_part(name: str) -> str:
    """The part of a CUDA kernel, copy or fill; "other" where its name says nothing."""
    return _part(_OURS, name) or _part(_KERNELS, name) or "other"


def device_work(intervals: Iterable[Interval]) -> list[Work]:
    """Each interval with the time in which no interval that began before it ran."""
    work, covered = [], 0.0
    for name, start, end in sorted(intervals, key=lambda interval: interval.start):
        work.append(Work(kernel_part(name), name, max(0.0, end - max(start, covered))))
        covered = max(covered, end)
    return work


def operator_work(events: Iterable[Any]) -> list[Work]:
    """Each operator (torch's `FunctionEvent`) with its own time, which its children's is no part of."""
    return [Work(_operator_part(event), event.name, event.self_cpu_time_total) for event in events]


def _operator_part(event: Any) -> str:
    """The part that the outermost operator around it belongs to, if its name says one."""
    part = "elementwise" if _COMPILED in event.name else None
    while event is not None:
        part = _part(_OPERATORS, event.name) or part
        event = event.cpu_parent
    return part or "other"


def _part(patterns: dict[str, str], name: str) -> str | None:
    return next((part for part, pattern in patterns.items() if re.search(pattern, name, re.IGNORECASE)), None)


def part_ms(work: Sequence[Work], steps: float, window_ms: float) -> dict[str, float]:
    """Milliseconds a step of each of PARTS; `gaps` is what the others leave of `window_ms`, a step's time."""
    parts = dict.fromkeys(PARTS, 0.0)
    for part, _, us in work:
        parts[part] += us / steps / 1000
    return {**parts, "gaps": max(0.0, window_ms - sum(parts.values()))}


def longest(work: Sequence[Work], steps: float, most: int = 12) -> dict[str, float]:
    """ "PART: NAME" to milliseconds a step, of the names that took most; long names are cut."""
    totals: dict[str, float] = {}
    for part, name, us in work:
        label = f"{part}: {' '.join(name.split())[:100]}"
        totals[label] = totals.get(label, 0.0) + us / steps / 1000
    return dict(sorted(totals.items(), key=lambda item: -item[1])[:most])
