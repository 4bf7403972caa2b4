"""Text to token ids and back, over the tokenizer files of a model folder. No remote code is ever run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from rowint8.baseline_engine.errors import EngineError, one_line
from rowint8.baseline_engine.files import require_file

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in _FILES[:-1])


class Tokenizer:
    """A Hugging Face tokenizer, its chat template, and decoding piece by piece."""

    def __init__(self, folder: Path):
        """Raises EngineError where the folder has no tokenizer that loads."""
        for name in _FILES:
            if (folder / name).exists():
                require_file(folder / name)
        with _explained(f"{folder} has no tokenizer that loads without remote code"):
            self._tokenizer = _load(folder)
            self._backend = self._tokenizer.backend_tokenizer
            self._backend.no_truncation()  # transformers would do so later, maybe while another thread decodes
            self._backend.no_padding()
            self._special = frozenset(self._tokenizer.all_special_ids) | {
                token_id for token_id, token in self._tokenizer.added_tokens_decoder.items() if token.special
            }
            self._byte_ids = _byte_fallback_ids(self._backend)
            self.longest = max(map(len, self._tokenizer.get_vocab()))
            """Characters of the longest token; no text has more of them a token."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt."""
        with _explained("the tokenizer fails on the prompt"):
            return self._tokenizer.encode(_checked_text(text))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation ({"role": ..., "content": ...} each) in the model's chat template."""
        if not self._tokenizer.chat_template:
            raise EngineError("the model has no chat template; leave --chat out")
        with _explained("the model's chat template refuses the messages"):
            prompt = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
            return self._tokenizer.encode(_checked_text(prompt), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, without special ones."""
        with _explained("the tokenizer fails on the tokens"):
            return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def stream(self) -> "TextStream":
        """A decoder for one request's tokens as they come."""
        return TextStream(self._backend, self._special, self._byte_ids)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns whatever tokenizers and templates raise, which has no common base class, into one line."""
    try:
        yield
    except (EngineError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the tokenizers' Rust code is no Exception
        raise EngineError(f"{what}: {one_line(error)[:200]}") from error


def _checked_text(text: Any) -> str:
    if not isinstance(text, str):
        raise EngineError(f"a prompt is {type(text).__name__}; text is needed")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise EngineError(f"the prompt is no UTF-8 text (at character {error.start + 1}); give text") from error
    return text


def _load(folder: Path):
    """tokenizer.json holds the whole tokenizer; only without it must transformers convert another format."""
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    from transformers import AutoTokenizer  # a slow import

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _byte_fallback_ids(backend: Any) -> frozenset[int]:
    """Tokens <0x00> to <0xFF> that stand for a byte each, where the tokenizer decodes them so."""
    ids = frozenset(token_id for byte in range(256) if (token_id := backend.token_to_id(f"<0x{byte:02X}>")) is not None)
    letter = backend.token_to_id("<0x41>")
    return ids if letter is not None and backend.decode([letter]).strip() == "A" else frozenset()


class TextStream:
    """Turns tokens into text one by one. Text that later tokens may still change is held back until they cannot:

    - a character cut across tokens, which decodes to a replacement character at the end;
    - a run of byte-fallback tokens: one that is no UTF-8 as a whole becomes replacement characters as a whole.

    Only the last tokens are decoded each time, with some before them that are shown already: what a token decodes to
    depends on its neighbours.
    """

    _KEPT, _MOST = 3, 8

    def __init__(self, backend: Any, special: frozenset[int], byte_ids: frozenset[int]):
        self._backend, self._special, self._byte_ids = backend, special, byte_ids
        self._ids: list[int] = []
        self._shown = 0
        """Characters of the text of `_ids` that are out."""

    def step(self, token_id: int) -> str:
        """The text that is settled with this token, maybe none."""
        if token_id in self._special:
            return ""
        self._ids.append(token_id)
        if token_id in self._byte_ids:
            return ""
        text = self._decode()
        settled = text.removesuffix("\N{REPLACEMENT CHARACTER}")
        new, self._shown = settled[self._shown :], max(self._shown, len(settled))
        if len(self._ids) > self._MOST and len(settled) == len(text):
            self._ids = self._ids[-self._KEPT :]
            self._shown = len(self._decode())
        return new

    def flush(self) -> str:
        """The text held back; no token follows."""
        text = self._decode()
        new, self._shown = text[self._shown :], len(text)
        return new

    def _decode(self) -> str:
        """Raises EngineError where the tokenizer fails on the tokens, which are then forgotten."""
        ids, self._ids = self._ids, []
        with _explained("the tokenizer fails on the output"):
            text = self._backend.decode(ids, skip_special_tokens=False)
        self._ids = ids
        return text


class TextOutput:
    """One request's text as it comes: watches for stop strings, and holds back what may be the beginning of one.

    What is taken, put together, is `text`.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str]):
        self._stream, self._stops = stream, stops
        self._longest = max(map(len, stops), default=0)
        self.text = ""
        """All text so far, up to a stop string."""
        self._taken = 0
        self._stopped = False

    def push(self, token_id: int) -> bool:
        """Takes one token; True where a stop string is complete."""
        return self._append(self._stream.step(token_id))

    def close(self) -> bool:
        """Takes the end of the text after the last token; True where a stop string is complete."""
        return self._stopped or self._append(self._stream.flush())

    def _append(self, new: str) -> bool:
        searched_from = max(0, len(self.text) - self._longest + 1)
        self.text += new
        found = [at for stop in self._stops if new and (at := self.text.find(stop, searched_from)) >= 0]
        if found:
            self.text, self._stopped = self.text[: min(found)], True
        return bool(found)

    def take(self, last: bool) -> str:
        """The text not taken yet; unless it is the last, without an end that a stop string may begin with."""
        held_back = 0
        if last:
            self.close()
        else:
            ends = range(min(self._longest - 1, len(self.text) - self._taken), 0, -1)
            held_back = next((n for n in ends if any(stop.startswith(self.text[-n:]) for stop in self._stops)), 0)
        start, self._taken = self._taken, len(self.text) - held_back
        return self.text[start : self._taken]
