"""Text to token ids and back, over the tokenizer files of a model folder. No remote code is ever run."""

from collections.abc import Mapping, Sequence
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

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt."""
        return self._tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation ({"role": ..., "content": ...} each) in the model's chat template."""
        if not self._tokenizer.chat_template:
            raise EngineError("the model has no chat template; leave --chat out")
        prompt = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
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


class TextOutput:
    """One request's text as it comes: watches for stop strings, and holds back what may be the beginning of one."""

    def __init__(self, stream: TextStream, stops: Sequence[str]):
        self._stream, self._stops = stream, stops
        self._longest = max(map(len, stops), default=0)
        self._text, self._shown = "", 0
        self.stopped_text: str | None = None
        """All text before the stop string, once there was one."""

    def push(self, token_id: int) -> bool:
        """Takes one token; True where a stop string is now complete."""
        new = self._stream.step(token_id)
        searched_from = max(0, len(self._text) - self._longest + 1)
        self._text += new
        found = [at for stop in self._stops if new and (at := self._text.find(stop, searched_from)) >= 0]
        if found:
            self._text = self.stopped_text = self._text[: min(found)]
        return bool(found)

    def take(self, last: bool) -> str:
        """The text not taken yet; unless it is the last, without an end that a stop string may begin with."""
        held_back = 0
        if not last:
            ends = range(min(self._longest - 1, len(self._text) - self._shown), 0, -1)
            held_back = next((n for n in ends if any(stop.startswith(self._text[-n:]) for stop in self._stops)), 0)
        start, self._shown = self._shown, len(self._text) - held_back
        return self._text[start : self._shown]
