"""The command `baseline-generate`: complete prompts with the baseline engine and print what it cost.

Text goes to stdout, progress and metrics to stderr; with --json stdout is one JSON object and nothing else. Options,
defaults and help of the sampling and the engine are those of the fields of `SamplingParams` and `EngineConfig`.
"""

import ast
import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import Parameter
from itertools import pairwise
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import typer

from rowint8.baseline_engine.config import EngineConfig, SamplingParams
from rowint8.baseline_engine.errors import EngineError, SettingError

if TYPE_CHECKING:
    from rowint8.baseline_engine.metrics import RunMetrics
    from rowint8.baseline_engine.request import Completion, TokenEvent

EXAMPLE = (
    "Example: baseline-generate --model models/smollm2-135m-instruct --quantization rowint8 --chat "
    "--prompt 'Why is the sky blue?'"
)
_NO_OPTIONS = ("logprobs",)
"""Fields whose result the command does not print."""


def _options(kind: type) -> dict[str, Parameter]:
    """A keyword parameter, in typer's terms, for each field of a dataclass of settings."""
    hints, docs = get_type_hints(kind), _field_docs(kind)
    parameters = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        flag = [f"--{field.name.replace('_', '-')}"] if field.default is False else []  # else typer adds --no-...
        choices = f"<{'|'.join(get_args(kind))}>" if get_origin(kind := _accepted(hint)[-1]) is Literal else None
        annotation = Annotated[_option_type(hint), typer.Option(*flag, help=docs[field.name], metavar=choices)]
        default = Parameter.empty if field.default is dataclasses.MISSING else field.default
        parameters[field.name] = Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=list(default) if isinstance(default, tuple) else default,
            annotation=annotation,
        )
    return {name: parameter for name, parameter in parameters.items() if name not in _NO_OPTIONS}


def _option_type(hint: Any) -> Any:
    """What typer parses an argument into; the dataclass checks the value."""
    kind = _accepted(hint)[-1]
    if get_origin(kind) is Literal:
        return type(get_args(kind)[0])
    return list[get_args(kind)[0]] if get_origin(kind) is tuple else kind


def _accepted(hint: Any) -> list[Any]:
    """The types that a field accepts, but None."""
    accepted = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [each for each in accepted if each is not NoneType]


def _field_docs(kind: type) -> dict[str, str]:
    """Field -> its docstring, the string below it."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, below in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            docs[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return docs


_SAMPLING, _ENGINE = _options(SamplingParams), _options(EngineConfig)


def generate(
    *,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Repeat for a batch. Without it, all of stdin is the prompt.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    warmup: Annotated[
        int, typer.Option(min=0, max=1000, help="Unmeasured runs of the same request before the real one.")
    ] = 0,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object (texts, token_ids, finish_reasons, metrics) instead of text and table.",
        ),
    ] = False,
    **settings: Any,
) -> None:
    """Complete prompts with the baseline engine: the text as it comes, then TTFT, ITL, TPOT, tok/s and memory."""
    with _errors_in_one_line():
        sampling = SamplingParams(**{name: settings[name] for name in _SAMPLING})
        config = EngineConfig(**{name: settings[name] for name in _ENGINE})
        prompts = prompt or [_read_stdin()]
        from rowint8.baseline_engine.engine import Engine

        engine = Engine(config, progress=True)
        for _ in range(warmup):
            engine.generate(prompts, sampling, chat=chat)
            engine.forget_prefixes()  # the real one computes its prompts
        completions = engine.generate(
            prompts, sampling, chat=chat, on_token=None if as_json else _printer(len(prompts))
        )
        assert engine.metrics is not None
        if as_json:
            print(_to_json(completions, engine.metrics))
        else:
            _print_table(engine.metrics, completions)
        _report_failures(completions)


def _signature() -> inspect.Signature:
    own = [each for each in inspect.signature(generate).parameters.values() if each.kind is Parameter.KEYWORD_ONLY]
    model, *engine = _ENGINE.values()
    return inspect.Signature([model, *own, *_SAMPLING.values(), *engine])


generate.__signature__ = _signature()  # pyright: ignore[reportFunctionMemberAccess]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command(epilog=EXAMPLE)(generate)


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
    except BrokenPipeError:  # the reader of stdout has gone, as head does; typer ends quietly
        raise
    except OSError as error:  # a full disk behind stdout
        _fail(f"error: {error}", code=1)


def _fail(message: str, code: int) -> NoReturn:
    print(f"baseline-generate: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _read_stdin() -> str:
    """All of stdin, less the line end that closes it."""
    if sys.stdin is None or sys.stdin.isatty():
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


def _report_failures(completions: "Sequence[Completion]") -> None:
    """Exits with 1 where the engine gave up on a request; the first one's error is the message."""
    failed = [(number, each.error) for number, each in enumerate(completions, 1) if each.finish_reason == "error"]
    if failed:
        number, error = failed[0]
        _fail(f"error: prompt {number}: {error} ({len(failed)} of {len(completions)} prompts failed)", code=1)


def _print_table(metrics: "RunMetrics", completions: "Sequence[Completion]") -> None:
    """With why each prompt's text ended: "length" is --max-tokens, "stop" a stop text or an end-of-text token."""
    from collections import Counter

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
    reasons = Counter(completion.finish_reason for completion in completions)
    told = [f'"{reason}"' + (f" ({count} prompts)" if len(reasons) > 1 else "") for reason, count in reasons.items()]
    caption = f"ended by {', '.join(told)}"
    table = Table(*cells, caption=caption, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_row(*cells.values())
    Console(stderr=True).print(table)


def _number(value: float | None, factor: float = 1) -> str:
    return "-" if value is None else f"{value * factor:.1f}"
