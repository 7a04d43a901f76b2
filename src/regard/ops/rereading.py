"""A second reading of a prompt: what the model is asked, and the note in which its tokens' worth stays."""

from dataclasses import dataclass

from regard.core.errors import require

WORTH = "worth"  # the note of a slot: the largest that any reading said of its token

Words = str | tuple[int, ...]  # a text, which needs a tokenizer, or token ids


@dataclass(frozen=True)
class Rereading:
    """The prompt is repeated chunk by chunk, each after an instruction, as if the model answered with it.

    whole   the instruction before the first chunk
    part    the instruction before a later chunk, with the `lead` last tokens before the chunk behind it
    answer  what stands between them and the chunk: where an answer begins in the model's chat template
    chunk   tokens of a chunk
    """

    whole: Words
    part: Words
    answer: Words
    chunk: int
    lead: int = 8

    def __post_init__(self) -> None:
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)
        require(self.lead >= 0, "lead >= 0", lead=self.lead)

    def before(self, nth: int) -> Words:
        """The instruction before a chunk, counted from 0."""
        return self.part if nth else self.whole
