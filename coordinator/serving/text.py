"""Text to tokens and back, and messages through a chat template; a model may have neither."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from ..types import InvalidRequest

INLINE_CHARACTERS = 16 << 10  # a longer text is tokenized on a worker, so that running generations go on


class Text:
    """Text ↔ tokens of one model."""

    def __init__(self, tokenizer: Any, stop_tokens: frozenset[int]) -> None:
        """As a checkpoint's `tokenizer()` gives them. `tokenizer`: transformers', or None: then only ids work."""
        self._tokenizer = tokenizer
        self.stop_tokens = stop_tokens

    @property
    def has_tokenizer(self) -> bool:
        """False: only token ids go in and out."""
        return self._tokenizer is not None

    async def encode(self, text: str) -> tuple[int, ...]:
        """The ids of a plain prompt, with the model's own beginning-of-text token. Raises InvalidRequest."""
        self._require_tokenizer("prompt")
        return await self._ids(text, add_special_tokens=True)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The ids of messages (role, content) written by the model's template, up to where its answer begins.

        Raises InvalidRequest when there's no template or it refuses them.
        """
        self._require_tokenizer("messages")
        if not self._tokenizer.chat_template:
            raise InvalidRequest(
                "This model has no chat template, so it can't read messages; send a prompt instead.", "messages"
            )
        text = await asyncio.to_thread(self._render, messages)
        return await self._ids(text, add_special_tokens=False)  # the template has written them

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; empty without a tokenizer."""
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def show(self, token: int) -> str:
        """One token by itself, special ones too, with the space that sentencepiece would drop."""
        if self._tokenizer is None:
            return ""
        text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        piece = self._tokenizer.convert_ids_to_tokens(token)
        return " " + text if str(piece).startswith("\u2581") and not text.startswith(" ") else text

    def _require_tokenizer(self, parameter: str) -> None:
        if self._tokenizer is None:
            raise InvalidRequest("This model has no tokenizer, so it can't read text; send token ids.", parameter)

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            return str(
                self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            )
        except TemplateSyntaxError as error:
            raise InvalidRequest(
                f"The model's chat template is broken, so it can't read messages ({error}); send a prompt instead.",
                "messages",
            ) from error
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}; change their roles or order.", "messages"
            ) from error

    async def _ids(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        if not text:
            raise InvalidRequest("The prompt is empty; send at least one character.", "prompt")
        if len(text) <= INLINE_CHARACTERS:
            return self._tokenize(text, add_special_tokens)
        return await asyncio.to_thread(self._tokenize, text, add_special_tokens)

    def _tokenize(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        # A list of one text takes the batch path, which runs outside the interpreter's lock.
        return tuple(self._tokenizer([text], add_special_tokens=add_special_tokens)["input_ids"][0])
