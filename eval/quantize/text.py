"""A text as a model sees it: what GPTQ rounds for, and what `rowint8 fidelity` measures on."""

import json
from pathlib import Path

import torch
from torch import Tensor

from rowint8.baseline_engine.errors import one_line
from rowint8.baseline_engine.files import read_json
from rowint8.eval.errors import EvalError


def read_text(path: Path) -> str:
    """A text file as it is; of a .jsonl file the fields `page` or `text` of all lines, joined.

    Raises:
        EvalError: it is no regular file, cannot be read, or is no UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise EvalError(f"cannot read {path}: it is no regular file")
        text = path.read_text(encoding="utf-8")
        return _joined(text) if path.suffix == ".jsonl" else text
    except OSError as error:
        raise EvalError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise EvalError(f"cannot read {path}: byte {error.start} is no UTF-8; convert the file to UTF-8") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EvalError(
            f"cannot read {path}: each line needs a JSON object with page or text ({one_line(error)})"
        ) from None


def _joined(lines: str) -> str:
    rows = [json.loads(line) for line in lines.splitlines() if line]
    return "".join(row["page"] if "page" in row else row["text"] for row in rows)


def token_windows(folder: Path, text: str, window: int, limit: int, trust_remote_code: bool = False) -> Tensor:
    """The first `limit` windows of the text, int64 [n, window], without special tokens and without overlap.

    Args:
        folder: of the model, with its tokenizer.
        trust_remote_code: whether the tokenizer's own Python code may run.

    Raises:
        EvalError: the folder has no tokenizer that loads, the model has fewer positions than a window has tokens, or
            the text is shorter than one window.
    """
    from transformers import AutoTokenizer

    positions = read_json(folder / "config.json").get("max_position_embeddings")
    if isinstance(positions, int) and positions < window:
        raise EvalError(
            f"{folder} has {positions} positions, less than a window of {window} tokens; give a smaller one"
        )

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    except Exception as error:  # its files may hold anything, and each library fails at them in its own way
        raise EvalError(f"{folder} has no tokenizer that loads: {one_line(error)}") from None
    count = min(limit, len(ids) // window)
    if count == 0:
        raise EvalError(f"the text has {len(ids)} tokens, less than one window of {window}; give a longer one")
    return torch.tensor(ids[: count * window]).view(count, window)
