"""A tokenizer whose conversations begin with a system prompt."""

from collections.abc import Sequence
from typing import Any

from regard.core import require


class Spoken:
    """A tokenizer like another, but that conversations in its chat template begin with `system`.

    ValueError where there is no template. A conversation that has a system prompt keeps its own.
    """

    def __init__(self, tokenizer: Any, system: str) -> None:
        known = bool(getattr(tokenizer, "chat_template", None))
        require(known, "a system prompt needs a tokenizer with a chat template", system=system)
        self.tokenizer, self.system = tokenizer, system

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def apply_chat_template(self, conversation: Sequence[dict], **options: Any) -> Any:
        """The conversation, its system prompt first."""
        first = () if conversation[0]["role"] == "system" else ({"role": "system", "content": self.system},)
        return self.tokenizer.apply_chat_template([*first, *conversation], **options)
