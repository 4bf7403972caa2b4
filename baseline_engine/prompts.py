"""What a caller may give as a prompt, turned into token ids that the model has."""

from collections.abc import Mapping, Sequence
from typing import Any

from rowint8.baseline_engine.errors import EngineError, shown
from rowint8.baseline_engine.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or the messages of a chat."""


def encode(prompt: Prompt, chat: bool, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """Token ids of a prompt; with `chat`, text is a user's message.

    Raises:
        EngineError: text without a tokenizer, messages without a template, `chat` with ids, what is no prompt, or a
            token that the model has no embedding for.
    """
    ids = _token_ids(prompt, chat, tokenizer)
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise EngineError(f"prompt holds token id {shown(token_id)}; the vocabulary is 0 to {vocab_size - 1}")
    return ids


def _token_ids(prompt: Any, chat: bool, tokenizer: Tokenizer | None) -> list[Any]:
    if isinstance(prompt, str):
        user = [{"role": "user", "content": prompt}]
        return _present(tokenizer).encode_chat(user) if chat else _present(tokenizer).encode(prompt)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise EngineError(f"a prompt is {shown(prompt)}; give text, a list of token ids, or messages")
    if prompt and isinstance(prompt[0], Mapping):
        for message in prompt:
            if not isinstance(message, Mapping) or not all(isinstance(part, str) for part in message.values()):
                raise EngineError(f"a message is {shown(message)}; give a role and a content, both text")
        return _present(tokenizer).encode_chat(prompt)
    if chat:
        raise EngineError("a chat message must be text; give the prompt as text, or leave chat out")
    return list(prompt)


def _present(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise EngineError("the model has no tokenizer files; give the prompt as token ids")
    return tokenizer
