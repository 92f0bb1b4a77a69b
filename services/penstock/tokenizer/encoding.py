"""Models whose tokenizers are loaded: prompts and conversations to ids, ids to text."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from penstock.common.errors import ContextOverflow, InvalidRequest, UnknownModel
from penstock.tokenizer.continuation import cut, marked
from penstock.tokenizer.detokenizers import Detokenizer, PrefixDetokenizer, TableDetokenizer
from penstock.tokenizer.loading import Vocabulary
from penstock.tokenizer.pieces import token_bytes
from penstock.tokenizer.templates import Templates

__all__ = ["Model", "Models"]

# A shorter text is encoded in less time than a thread takes to begin.
_INLINE_CHARACTERS = 512
# Characters per token of the limit that are looked at first; languages and code have one to six.
_HEAD_CHARACTERS = 16


class Model:
    """One model's tokenizer at work."""

    def __init__(self, name: str, vocabulary: Vocabulary, templates: Templates | None) -> None:
        self.name = name
        self.vocabulary = vocabulary
        self._templates = templates

    async def encode(self, text: str, *, add_special_tokens: bool, max_tokens: int = 0, field: str = "prompt") -> list[int]:
        """The ids of a text. `max_tokens` 0 is no limit; `field` is what an error names.

        Raises:
            ContextOverflow: it is longer than `max_tokens`.
        """
        if len(text) <= _INLINE_CHARACTERS:
            ids = self._encode(text, add_special_tokens=add_special_tokens)
        else:
            if max_tokens and len(text) > 4 * _HEAD_CHARACTERS * max_tokens:
                await self._refuse_by_its_head(text, max_tokens, field)
            ids = await asyncio.to_thread(self._encode, text, add_special_tokens=add_special_tokens)
        if max_tokens and len(ids) > max_tokens:
            raise ContextOverflow.field(field, f"{len(ids)} tokens; at most {max_tokens} fit")
        return ids

    async def _refuse_by_its_head(self, text: str, max_tokens: int, field: str) -> None:
        """Spare the work on a text of which a small part is too much already, by far."""
        head = await asyncio.to_thread(self._encode, text[: _HEAD_CHARACTERS * max_tokens], add_special_tokens=False)
        if len(head) > 2 * max_tokens:
            raise ContextOverflow.field(field, f"more than {len(head)} tokens; at most {max_tokens} fit")

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
        max_tokens: int = 0,
    ) -> list[int]:
        """The ids of a conversation, rendered by the chat template.

        Args:
            messages: their `role` and `content`, and `name` where a template uses one.
            add_generation_prompt: the opening of an answer follows them.
            continue_final_message: they end with the last one's text, with nothing that closes it.
            chat_template_kwargs: what the template reads beside them.
            max_tokens: 0 is no limit.

        Raises:
            InvalidRequest: there is no template, it refuses these messages, the last one can not be gone on with, or it does not
                read what it is given beside them.
            ContextOverflow: they are longer than `max_tokens`.
        """
        if self._templates is None:
            raise InvalidRequest.field("messages", f"model {self.name!r} has no chat template; send a prompt instead")
        if not messages:
            raise InvalidRequest.field("messages", "must hold at least one message")
        if continue_final_message:
            open_ended, mark = marked(messages)
            rendered = await self._templates.render(
                open_ended, add_generation_prompt=False, chat_template_kwargs=chat_template_kwargs
            )
            text = cut(rendered, mark, messages[-1]["content"])
        else:
            text = await self._templates.render(
                messages, add_generation_prompt=add_generation_prompt, chat_template_kwargs=chat_template_kwargs
            )
        return await self.encode(text, add_special_tokens=False, max_tokens=max_tokens, field="messages")

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # Of the library's ways in, the one that lets other threads run and does not work offsets out.
        ids: list[int] = self.vocabulary.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of all ids at once.

        Raises:
            InvalidRequest: an id is outside the vocabulary.
        """
        unknown = next((i for i in ids if i >= self.vocabulary.size), None)
        if unknown is not None:
            raise InvalidRequest.field("token_ids", f"{unknown} is not in the vocabulary; ids are below {self.vocabulary.size}")
        return await asyncio.to_thread(self.vocabulary.tokenizer.decode, ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        """A new one for one growing answer."""
        if self.vocabulary.pieces is not None:
            return TableDetokenizer(self.vocabulary.pieces, skip_special_tokens=skip_special_tokens)
        return PrefixDetokenizer(self.vocabulary.tokenizer, skip_special_tokens=skip_special_tokens)

    def describe(self, ids: Sequence[int]) -> list[bytes]:
        """Each id's own bytes; empty for an unknown id."""
        return [token_bytes(self.vocabulary.tokenizer, self.vocabulary.pieces, i) for i in ids]

    async def close(self) -> None:
        """End what renders its template."""
        if self._templates is not None:
            await self._templates.close()


class Models:
    """The models of one service, by name."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = {model.name: model for model in models}

    def get(self, name: str) -> Model:
        """The model of this name; an empty name is the one model, where there is one only.

        Raises:
            UnknownModel: there is none.
        """
        model = self.find(name)
        if model is None:
            raise UnknownModel(f"no tokenizer of a model {name!r} here; there are {', '.join(sorted(self._models)) or 'none'}")
        return model

    def find(self, name: str) -> Model | None:
        """The same; None where there is none."""
        if not name and len(self._models) == 1:
            return next(iter(self._models.values()))
        return self._models.get(name)

    async def close(self) -> None:
        """Close every model."""
        for model in self._models.values():
            await model.close()
