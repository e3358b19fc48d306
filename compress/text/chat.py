"""Conversations as text: each is written out by the model's own chat template."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from paredown.compress.errors import PareError

# What a column of rows holds: strings, conversations (lists of {role, content}), or anything else.
Kind = Literal["text", "chat", "other"]


@dataclass(frozen=True, eq=False)
class Chat:
    """The chat template of a tokenizer.

    `opening` is the text of the special tokens that the tokenizer puts before a text by itself. A template that writes them
    too loses them, because windows get them anyway; between conversations that are joined they stay.
    """

    tokenizer: Any
    opening: str = ""

    @cached_property
    def key(self) -> str:
        """A digest of the template and the special tokens, on which the text of a conversation depends."""
        told = repr((self.tokenizer.chat_template, self.opening, sorted(map(str, self.tokenizer.all_special_tokens))))
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    @cached_property
    def joiner(self) -> str:
        """What stands between two conversations: the template ends each by itself."""
        begins = self._rendered([{"role": "user", "content": "a"}]).startswith(self.opening)
        return self.opening if begins else ""

    def text(self, messages: Sequence[Mapping[str, Any]] | None) -> str:
        """One conversation, without the opening; nothing for a row that holds none.

        Raises PareError without a template, and for what the template refuses.
        """
        # Parquet fills in keys that only other messages have
        plain = [{k: v for k, v in message.items() if v is not None or k == "content"} for message in messages or ()]
        return self._rendered(plain).removeprefix(self.opening) if plain else ""

    def check(self, spec: str) -> None:
        """Raise PareError if there is no template for the conversations of `spec`."""
        if not self.tokenizer.chat_template:
            raise PareError(
                f"{spec} holds conversations, and the tokenizer of this model has no chat template. Copy chat_template.jinja "
                "of the model that was trained on conversations into its folder, or name a column of plain text."
            )

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as fault:  # jinja's, and whatever a template raises
            raise PareError(f"the model's chat template refuses it: {' '.join(str(fault).split())[:200]}") from fault


def is_conversation(value: Any) -> bool:
    """Whether a value of JSON is a list of messages, each with a role and a content."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )
