"""`baseline-generate`: complete prompts with the baseline engine and print what it cost.

Text goes to stdout, progress and metrics to stderr; with --json stdout is one JSON object and nothing else.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from rowint8.baseline_engine.errors import EngineError, SettingError

if TYPE_CHECKING:
    from rowint8.baseline_engine.metrics import RunMetrics
    from rowint8.baseline_engine.request import Completion, TokenEvent

EXAMPLE = (
    "Example: baseline-generate --model models/smollm2-135m-instruct --quantization rowint8 --chat "
    "--prompt 'Why is the sky blue?'"
)
FUSED_HELP = (
    "Gate, up, SiLU and product as one operator. With rowint8 the default is --fused (unless the model's MLP has a "
    "bias); without rowint8 --fused is refused."
)
JSON_HELP = "Print one JSON object (texts, token_ids, finish_reasons, metrics) instead of text and table."

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Quantization(str, Enum):
    none = "none"
    rowint8 = "rowint8"


class Mode(str, Enum):
    eager = "eager"
    compile = "compile"
    graph = "graph"


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command(epilog=EXAMPLE)
def generate(
    model: Annotated[str, typer.Option(help="Folder with config.json, safetensors and tokenizer, or a hub name.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Repeat for a batch. Without it, all of stdin is the prompt.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate; the context may end earlier.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; larger is more random.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that add up to p; 1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Draw from tokens at least this times as likely as the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens seen so far less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of each prompt's draws; without it they differ every time.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens; to measure.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output. Repeat for more.")] = None,
    quantization: Annotated[
        Quantization, typer.Option(help="rowint8: linear weights as INT8 rows, quantized while loading.")
    ] = Quantization.none,
    fused: Annotated[bool | None, typer.Option("--fused/--no-fused", help=FUSED_HELP)] = None,
    int8_lm_head: Annotated[bool, typer.Option("--int8-lm-head", help="With rowint8: the output layer too.")] = False,
    mode: Annotated[
        Mode, typer.Option(help="compile: torch.compile the layers at start; graph: CUDA graphs for decoding, too.")
    ] = Mode.eager,
    dtype: Annotated[Dtype, typer.Option(help="Of activations; auto is the checkpoint's.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; auto takes a GPU if there is one.")] = "auto",
    max_seqs: Annotated[int, typer.Option(help="Most prompts that run at the same time.")] = 256,
    max_batch_tokens: Annotated[int, typer.Option(help="Most tokens a step computes.")] = 8192,
    max_context: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and output. Default: the model's.")
    ] = None,
    cache_tokens: Annotated[int | None, typer.Option(help="Size of the KV cache. Default: what memory allows.")] = None,
    memory_fraction: Annotated[float, typer.Option(help="Of the GPU's memory, for weights and KV cache.")] = 0.9,
    warmup: Annotated[int, typer.Option(min=0, help="Unmeasured runs of the same request before the real one.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Complete prompts with the baseline engine: the text as it comes, then TTFT, ITL, TPOT, tok/s and memory."""
    with _errors_in_one_line():
        from rowint8.baseline_engine.engine import Engine, EngineConfig
        from rowint8.baseline_engine.sampler import SamplingParams

        prompts = prompt or [_read_stdin()]
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            ignore_eos=ignore_eos,
            stop=tuple(stop or ()),
        )
        config = EngineConfig(
            model,
            quantization=quantization.value,
            fused=fused,
            int8_lm_head=int8_lm_head,
            mode=mode.value,
            dtype=dtype.value,
            device=device,
            max_seqs=max_seqs,
            max_batch_tokens=max_batch_tokens,
            max_context=max_context,
            cache_tokens=cache_tokens,
            memory_fraction=memory_fraction,
        )
        engine = Engine(config, progress=True)
        for _ in range(warmup):
            engine.generate(prompts, sampling, chat=chat)
            engine.forget_prefixes()  # the real one computes its prompts
        printer = None if as_json else _printer(len(prompts))
        completions = engine.generate(prompts, sampling, chat=chat, on_token=printer)
        assert engine.metrics is not None
        if as_json:
            print(_to_json(completions, engine.metrics))
        else:
            _print_table(engine.metrics, engine.attention_name)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except SettingError as error:
        _fail(f"error: {error}", code=2)
    except EngineError as error:
        _fail(f"error: {error}", code=1)
    except KeyboardInterrupt:
        _fail("interrupted", code=130)


def _fail(message: str, code: int) -> NoReturn:
    print(f"baseline-generate: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _read_stdin() -> str:
    """All of stdin, less the line end that closes it."""
    if sys.stdin.isatty():
        raise SettingError("no prompt; give --prompt TEXT or pipe text into stdin")
    try:
        return sys.stdin.read().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise SettingError(f"stdin is no text in {error.encoding}; pipe text") from error


def _printer(num_prompts: int) -> "Callable[[TokenEvent], None]":
    """Prints one prompt's text as it comes; of several, each whole text with its number when it is finished."""
    texts = [""] * num_prompts

    def show(event: "TokenEvent") -> None:
        texts[event.request] += event.text
        if num_prompts == 1:
            print(event.text, end="" if event.finish_reason is None else "\n", flush=True)
        elif event.finish_reason is not None:
            print(f"[{event.request + 1}] {texts[event.request]}", flush=True)

    return show


def _to_json(completions: "Sequence[Completion]", metrics: "RunMetrics") -> str:
    result = {
        "texts": [completion.text for completion in completions],
        "token_ids": [completion.token_ids for completion in completions],
        "finish_reasons": [completion.finish_reason for completion in completions],
        "metrics": metrics.to_dict(),
    }
    return json.dumps(result, allow_nan=False)


def _print_table(metrics: "RunMetrics", attention: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    cells = {
        "TTFT ms": _number(metrics.ttft, 1000),
        "ITL ms": _number(metrics.itl, 1000),
        "TPOT ms": _number(metrics.tpot, 1000),
        "tok/s": _number(metrics.tok_s),
        "tokens": str(metrics.output_tokens),
        "peak MiB": _number(metrics.peak_mem, 2**-20),
        "weights MiB": _number(metrics.weight_bytes, 2**-20),
        "load s": _number(metrics.load_seconds),
        "compile s": _number(metrics.compile_seconds),
    }
    caption = f"attention: {attention}; the KV cache blocks in use were {metrics.steps.kv_waste:.1%} empty"
    table = Table(*cells, caption=caption, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_row(*cells.values())
    Console(stderr=True).print(table)


def _number(value: float | None, factor: float = 1) -> str:
    return "-" if value is None else f"{value * factor:.1f}"


def main() -> None:
    """Entry point of `baseline-generate`."""
    app()
