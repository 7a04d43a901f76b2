"""Tokenizers that are made while they read, for the laws of tasks, and the samples that a task draws with them."""

import re
from functools import lru_cache
from typing import Any

from regard.core import Method
from regard.kinds.task import ask
from regard.tasks import Sample


class WordTokenizer:
    """A tokenizer with one id for each word, digit and sign, given out as they come; id 0 begins every text.

    `letters`: longer words take several ids, so that not all texts of so many words are equally long. `spare` ids
    stand for no word yet.
    """

    chat_template = None

    def __init__(self, bos: int | None = 0, spare: int = 200, letters: int | None = None) -> None:
        self.word = rf"<s>|\d| ?[^\W\d]{f'{{1,{letters}}}' if letters else '+'}|\s|."
        self.bos_token_id, self.pieces, self.known, self.spare = bos, ["<s>"], {"<s>": 0}, spare
        self.all_special_ids = [0]

    def __len__(self) -> int:
        return len(self.pieces) + self.spare

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        pieces = pieces_of(self.word, text)
        for piece in dict.fromkeys(pieces):
            if piece not in self.known:
                self.known[piece] = len(self.pieces)
                self.pieces.append(piece)
        return [*ids, *map(self.known.__getitem__, pieces)]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] if i < len(self.pieces) else f"<{i}>" for i in ids)


@lru_cache(1 << 14)
def pieces_of(word: str, text: str) -> tuple[str, ...]:
    """A text in pieces, each of which is a `word`: the same few texts are read by every tokenizer that is made."""
    return tuple(re.findall(word, text))  # shared: nobody is to change it


class ChatTokenizer(WordTokenizer):
    """The same with a chat template: a system prompt of its own where none is given, marks around each message."""

    SYSTEM, END = "<s><system>Answer in few words.<end>\n", "<end>\n"
    chat_template = "a template"

    def apply_chat_template(
        self, messages: list[dict], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize, "the tasks ask for text"
        said = "".join(f"<{m['role']}>{m['content']}{self.END}" for m in messages)
        return self.SYSTEM + said + ("<assistant>" if add_generation_prompt else "")


def samples(
    method: Method, length: int, count: int, seed: int, tokenizer: Any = None, chat: bool = False
) -> list[Sample]:
    return ask(method).samples(tokenizer or WordTokenizer(), length, count, seed, chat=chat)
