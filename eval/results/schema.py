"""What the rows of result files hold, a class for each kind; `files` describes the file around them.

`rowint8.baseline_engine.metrics` defines TTFT, ITL, TPOT, tok/s and peak memory. Here they have names, units
(ms, tokens per second, GiB = 2^30 bytes) and limits. A row says its `kind`, so a file is read without being told.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

GIB = 2**30

CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

Name = Annotated[str, Field(min_length=1)]
_MOST = 1e15
"""No count and no measurement in these units is larger; sums and products of some stay finite."""
Count = Annotated[int, Field(ge=1, le=_MOST)]
Positive = Annotated[float, Field(gt=0, le=_MOST)]
NotNegative = Annotated[float, Field(ge=0, le=_MOST)]
Share = Annotated[float, Field(ge=0, le=1)]
Dtype = Name
"""The arithmetic's, such as "bfloat16"."""
EngineName = Literal["baseline", "vllm", "transformers"]

PARTS: tuple[str, ...] = ("matmul", "attention", "norm", "elementwise", "sampling", "copies", "other", "gaps")
"""Parts of a decode step. matmul: products with a weight, and the dequantization and whatever else is fused into them.
norm: RMSNorm and what is fused into it, and the rounding of tokens to INT8. elementwise: all other arithmetic on
activations (RoPE, SiLU, sums), and the writing of new keys and values into the cache. copies: moves, casts, gathers and
embeddings. gaps: none of these ran."""
CHAIN_PRODUCTS: tuple[str, ...] = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Generation:
    """What every row of an engine that generates holds: one setup, `batch` completions at once."""

    kind: str
    engine: EngineName
    setup: Name
    """What was varied, such as "bf16-eager", "int8-fused" or "rowint8"."""
    batch: Count
    prompt_tokens: Count
    """Tokens of each prompt (the mean, rounded, where they differ)."""
    output_tokens: Count
    """Tokens of each completion (the mean, rounded, where they differ)."""
    ttft_ms: Positive
    itl_ms: Positive | None
    """None with a single output token, as is tpot_ms."""
    tpot_ms: Positive | None
    tok_s: Positive
    weights_gib: Positive
    peak_mem_gib: Positive
    command: Name | None = None
    """The command line of this row, where the file's command ran several."""

    @property
    def size(self) -> tuple[int, int, int]:
        """Batch, prompt and output tokens; rows of the same size can be compared."""
        return self.batch, self.prompt_tokens, self.output_tokens

    @model_validator(mode="after")
    def _gaps_exist(self) -> "Generation":
        if self.output_tokens > 1 and (self.itl_ms is None or self.tpot_ms is None):
            raise ValueError("itl_ms and tpot_ms may be null only where output_tokens is 1")
        return self


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class GenerationRow(Generation):
    """One run."""

    kind: Literal["generation"] = "generation"


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Measured(Generation):
    """Medians over repeated runs of one workload."""

    repeats: Count
    spread: dict[Name, NotNegative]
    """(largest - smallest) / median over the repeats, for "ttft_ms", "itl_ms", "tpot_ms" and "tok_s"."""
    start_s: Positive
    """Seconds until the setup's engine had started, once for all its rows, with caches as they were found."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class VllmRow(Measured):
    """vLLM; the memory is that of the GPU that holds most."""

    kind: Literal["vllm"] = "vllm"
    tensor_parallel_size: Count
    compiled: tuple[Name, ...]
    """Kernels and graphs compiled while this workload ran: the engine had started and answered a first request."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class EngineRow(Measured):
    """The small engine, or vLLM or transformers beside it."""

    kind: Literal["engine"] = "engine"
    host_ms: NotNegative | None
    """The host's own work in the median step: scheduling, packing, queueing, recording (on the CPU the computation
    too). None for other engines, as are the next two."""
    kv_waste: Share | None
    """Share of the KV cache held by requests that held no token, mean over steps."""
    attention: Name | None
    """What computed attention."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class QualityRow:
    """One metric of one setup on one task, and its paired difference from the setup that it is compared with."""

    kind: Literal["quality"] = "quality"
    engine: EngineName
    setup: Name
    task: Name
    metric: Name
    """lm-eval's name, such as "acc" (in [0, 1]) or "word_perplexity", with ",filter" where there are several; or
    "logprob": log-probability (natural) of the right answer among several, mean over questions."""
    dtype: Dtype
    questions: Count
    value: float
    stderr: NotNegative | None
    """None where there is no way to tell, as for metrics that are not made of one number a question."""
    difference: float | None = None
    """This setup minus the other, over the same questions; None in the rows of the other, and where stderr may be."""
    difference_stderr: NotNegative | None = None
    gained: Annotated[int, Field(ge=0)] | None = None
    """Questions that only this setup answers rightly; None where the metric has no right and wrong."""
    lost: Annotated[int, Field(ge=0)] | None = None
    """Questions that only the other setup answers rightly."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class AgreementRow:
    """How long two engines write the same greedy tokens after one prompt."""

    kind: Literal["agreement"] = "agreement"
    setup: Name
    dtype: Dtype
    prompt: Name
    tokens: Count
    """Tokens that each engine generates."""
    agreed: Annotated[int, Field(ge=0)]
    """First tokens that are the same."""
    logprob_gap: NotNegative | None
    """Where they part: log-probability of vLLM's token less that of the other's, by vLLM; None where they do not."""
    tensor_parallel_size: Count = 1
    """Ranks of vLLM. With several the other engine is vLLM on one."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class FidelityRow:
    """How far one setup's next-token distributions are from the unquantized model's, over the same tokens."""

    kind: Literal["fidelity"] = "fidelity"
    setup: Name
    """What the weights are: "rowint8", "fp8-row", "only down_proj" (all others unquantized), a checkpoint's folder."""
    text: Name
    """Name of the text's file."""
    window: Count
    """Tokens the model sees at a time."""
    dtype: Dtype
    tokens: Count
    perplexity: Positive
    nll_difference: float
    """Mean negative log-likelihood of the text's tokens less the unquantized model's, nats."""
    nll_difference_stderr: NotNegative
    """Standard error of the mean of the paired differences; tokens count as independent."""
    kl_mean: NotNegative
    """KL divergence from the unquantized model, nats, as are the next three."""
    kl_median: NotNegative
    kl_p99: NotNegative
    kl_max: NotNegative
    same_top1: Share
    """Share of tokens at which both find the same token likeliest."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class ProfileRow:
    """Where the time of one decode step goes: one token for each of `batch` requests."""

    kind: Literal["profile"] = "profile"
    engine: EngineName
    setup: Name
    sampling: Name
    """"greedy" or "top-p"."""
    batch: Count
    context: Count
    """Tokens that each request attends to, mean over the steps, rounded."""
    steps: Count
    """Steps that count, with and without the profiler."""
    step_ms: Positive
    """Wall time of a step without the profiler."""
    profiled_ms: Positive
    """Wall time of a step with it."""
    parts_ms: dict[Name, NotNegative]
    """Milliseconds a step of each of PARTS. They add up to step_ms, on the CPU to profiled_ms; on CUDA to more where
    the profiler found the device busy for longer than step_ms."""
    longest_ms: dict[Name, NotNegative]
    """ "PART: NAME" of the kernels or operators that took most, to milliseconds a step."""
    launches: Positive
    """Kernels, copies and fills a step; on the CPU operators."""
    host_ms: dict[Name, NotNegative] | None
    """The host's part of step_ms: "schedule", "launch" (on the CPU the computation too), "wait" (for the device),
    "record"; and "detokenize", a part of record, where there is a tokenizer. None for vLLM, as are the next four."""
    served_ms: Positive | None
    """A step where each request is a coroutine of `AsyncEngine`."""
    padding: Share | None
    """Share of the rows that a step computes, in a CUDA graph, for no request."""
    kv_waste: Share | None
    """As in `EngineRow`, and so is `attention`."""
    attention: Name | None
    weight_bytes: Count
    """All weights but an embedding that is no output layer: what a step must read."""
    kv_bytes: Count
    """Keys and values that the requests attend to."""
    limit_ms: dict[Name, NotNegative] | None
    """Least time to read "weights" and "kv" once, at the rate that this card reached in the same process; None on the
    CPU."""

    @model_validator(mode="after")
    def _parts_are_all(self) -> "ProfileRow":
        host = {name: ms for name, ms in (self.host_ms or {}).items() if name != "detokenize"}
        _require_keys("parts_ms", self.parts_ms, PARTS)
        _require_keys("host_ms", host if self.host_ms is not None else None, ("schedule", "launch", "wait", "record"))
        _require_keys("limit_ms", self.limit_ms, ("weights", "kv"))
        return self


def _require_keys(field: str, values: dict[str, float] | None, keys: tuple[str, ...]) -> None:
    """Raises ValueError unless there are no values or one of each key, and some above 0."""
    if values is not None and (set(values) != set(keys) or not any(values.values())):
        raise ValueError(f"{field} must have {', '.join(keys)}, and not all 0")


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class ServeRow:
    """One run of a setup of `vllm serve` under requests that arrive at random (Poisson), by `vllm bench serve`."""

    kind: Literal["serve"] = "serve"
    engine: EngineName
    setup: Name
    request_rate: Positive
    """Requests per second that were sent, on average."""
    requests: Count
    """Requests answered; a run in which one fails has no row."""
    prompt_tokens: Count
    output_tokens: Count
    """Tokens of each answer."""
    ttft_ms: dict[Name, Positive]
    """Percentiles over the requests: "p50", "p95" (absent from older files) and "p99"."""
    tpot_ms: dict[Name, NotNegative]
    """As ttft_ms; 0 where all tokens of an answer came at once."""
    itl_ms: dict[Name, NotNegative]
    """Percentiles over all gaps between two chunks of an answer."""
    tok_s: Positive
    """Output tokens of all requests / time from the first request to the end of the last."""
    goodput: NotNegative
    """Requests per second that met every limit of `goodput_limits_ms`."""
    goodput_limits_ms: dict[Name, Positive]
    """Such as {"ttft": 200, "tpot": 50}."""
    command: Name
    """The client's command line."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Ceilings:
    """What the card does at best, measured in the same run as the rows beside it."""

    read_tb_s: Positive
    """10^12 bytes per second, read only."""
    bf16_tflop_s: Positive
    """10^12 operations per second of a large bf16 matrix product, two operations a multiplication and addition."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Ratio:
    """One time over another, of replays that took turns in one process (`rowint8.eval.kernels.timing`)."""

    value: Positive
    """The median of the rounds' ratios."""
    low: Positive
    """The median of all such ratios lies between this and `high` with a probability of at least 95%."""
    high: Positive

    @model_validator(mode="after")
    def _ordered(self) -> "Ratio":
        if not self.low <= self.value <= self.high:
            raise ValueError("low, value and high must rise")
        return self


Clocks = tuple[Count, Count]
"""The multiprocessors' clock before the first and after the last replay of a row, MHz."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Compilation:
    """What torch.compile made of an operator written in plain torch."""

    kernels: tuple[Name, ...]
    """Kernels it generated, by the names it gave them: they say which operations each one fuses."""
    extern: tuple[Name, ...]
    """Library calls left beside them, such as "extern_kernels.mm"."""
    log: tuple[Name, ...]
    """Inductor's own account: the nodes it had, which it fused and why not others."""


KernelOp = Literal[
    "linear",
    "swiglu",
    "add_rms_norm",
    "linear_int8",
    "swiglu_int8",
    "quantize_tokens+linear_int8",
    "quantize_tokens+swiglu_int8",
    "experts",
]
"""The operators of `rowint8.kernels.ops`. INT8 products are timed twice: on tokens that are rounded already, and with
their rounding."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class KernelRow:
    """Times of one operator on M tokens and an [N, K] weight; for `add_rms_norm` on [M, H], N = K = H."""

    kind: Literal["kernel"] = "kernel"
    op: KernelOp
    shape: Name
    """One of `rowint8.eval.kernels.shapes`."""
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """The activations'."""
    M: Count
    N: Count
    K: Count
    us: dict[Name, Positive]
    """Median microseconds a call: "rowint8" and what it is compared with."""
    spread: dict[Name, NotNegative]
    """(slowest - fastest) / median of the repetitions, for each entry of `us`."""
    paired: Annotated[dict[Name, Ratio] | None, Field(exclude_if=lambda value: value is None)] = None
    """rowint8's time over each other's, in turns; absent from older files, as are the next two."""
    sm_mhz: Annotated[Clocks | None, Field(exclude_if=lambda value: value is None)] = None
    """Absent too where the driver does not tell."""
    host_us: Annotated[dict[Name, Positive] | None, Field(exclude_if=lambda value: value is None)] = None
    """Microseconds of the host to queue a call, for some entries of `us`."""
    compiler: Annotated[dict[Name, Compilation] | None, Field(exclude_if=lambda value: value is None)] = None
    """For the entries of `us` that torch.compile made; absent where there are none."""
    experts_used: Annotated[Positive | None, Field(exclude_if=lambda value: value is None)] = None
    """Experts that a call of `experts` reads, whose gate_up is [N, K] and down [K, N / 2], in the mean."""
    topk: Annotated[Count | None, Field(exclude_if=lambda value: value is None)] = None
    """Experts a token, likewise."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class ChainRow:
    """The products and norms of a model's layers on M tokens, attention left out, in one CUDA graph."""

    kind: Literal["chain"] = "chain"
    chain: Name
    """The weights' format: "bf16", "rowint8", "rowint8-a8", "fp8", "int8" (both operands) or "machete"."""
    kernels: Name
    """What multiplies, normalizes and activates."""
    model: Name
    layers: Count
    M: Count
    us: Positive
    """Median microseconds of all layers."""
    spread: NotNegative
    """(slowest - fastest) / median of the rounds."""
    ratio: Ratio | None
    """This chain's time over bf16's, in turns; None in the rows of bf16."""
    alone_us: dict[Name, Positive]
    """Median microseconds a call of "qkv", "o", "gate_up", "down", "norm" and, where gate_up does not hold it,
    "activation", each in a graph of calls of its own kind, over the weights of all layers."""
    sm_mhz: Annotated[Clocks | None, Field(exclude_if=lambda value: value is None)] = None
    """Absent where the driver does not tell."""

    @property
    def products_alone_us(self) -> float:
        """The products of all layers, from their isolated calls."""
        return self.layers * sum(self.alone_us[name] for name in CHAIN_PRODUCTS)

    @property
    def products_us(self) -> float:
        """What the products take in the chain: its time less the isolated norms' and activations'."""
        return self.us - self.layers * (2 * self.alone_us["norm"] + self.alone_us.get("activation", 0.0))


Row = Annotated[
    GenerationRow
    | VllmRow
    | EngineRow
    | QualityRow
    | AgreementRow
    | FidelityRow
    | ProfileRow
    | ServeRow
    | KernelRow
    | ChainRow,
    Field(discriminator="kind"),
]
"""A row of any kind."""
