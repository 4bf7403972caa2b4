"""Text to token ids and back, over the tokenizer files of a model folder. No remote code is ever run."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from rowint8.baseline_engine.errors import EngineError

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in _FILES)


class Tokenizer:
    """A Hugging Face tokenizer, its chat template, and decoding piece by piece."""

    def __init__(self, folder: Path):
        """Raises EngineError where the folder has no tokenizer that loads."""
        try:
            self._tokenizer = _load(folder)
            self._backend = self._tokenizer.backend_tokenizer
        except Exception as error:  # missing files, broken JSON and unknown classes have no common base class
            reason = " ".join(str(error).split())[:200]
            raise EngineError(f"{folder} has no tokenizer that loads without remote code: {reason}") from error

    def encode(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of a plain prompt, or with `chat` of a user's message in the model's chat template."""
        if not chat:
            return self._tokenizer.encode(text)
        if not self._tokenizer.chat_template:
            raise EngineError("the model has no chat template; leave --chat out")
        messages = [{"role": "user", "content": text}]
        prompt = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._tokenizer.encode(prompt, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, without special ones."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def stream(self) -> "TextStream":
        """A decoder for one request's tokens as they come."""
        return TextStream(self._backend)


def _load(folder: Path):
    """tokenizer.json holds the whole tokenizer; only without it must transformers convert another format."""
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    from transformers import AutoTokenizer  # a slow import

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


class TextStream:
    """Turns tokens into text one by one; a character cut across tokens comes with its last one."""

    def __init__(self, backend):
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)

    def step(self, token_id: int) -> str:
        """The text that this token completes, maybe none."""
        return self._stream.step(self._backend, token_id) or ""
