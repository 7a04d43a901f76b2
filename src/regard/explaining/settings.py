"""How much an explanation measures: what is asked for, and what a prompt's length leaves time for where nothing is."""

from dataclasses import asdict, dataclass

LONG = 1024  # tokens beyond which less is measured unless it is asked for


@dataclass(frozen=True)
class Effort:
    """Numbers that an explanation goes by."""

    variations: int = 8
    verify: int = 20
    top: int = 5
    draws: int = 20
    removals: int = 64
    parts: int = 64
    edges: int = 24
    removed: tuple[int, ...] = (1, 2, 4, 8)
    why: bool = False
    seed: int = 0


FOR_LONG = Effort(variations=4, verify=6, draws=6, removals=24, parts=32, edges=0, removed=(1, 4))


@dataclass(frozen=True)
class Settings:
    """How much is measured: the more the slower, and never another result for what is. None: by the prompt's length.

    verify    heads whose effect is measured exactly, of those with the largest estimate; MLPs a quarter of that
    top       heads that count as those that mattered
    draws     random sets of heads, the control of the top ones
    removals  removals for the surrogate; half as many judge all ways
    parts     spans that a long prompt is cut into
    edges     edges of the graph; 0: no graph
    removed   how many of the parts that a way names first are removed to judge it
    why       whether the score of each top head is split over what wrote its query and its key

    >>> Settings(verify=9).for_length(50).verify, Settings().for_length(50).verify, Settings().for_length(5000).verify
    (9, 20, 6)
    """

    verify: int | None = None
    top: int | None = None
    draws: int | None = None
    removals: int | None = None
    parts: int | None = None
    edges: int | None = None
    removed: tuple[int, ...] | None = None
    why: bool = False
    seed: int = 0

    def for_length(self, tokens: int, variations: int | None = None) -> Effort:
        """What is asked for, and for the rest what a prompt of so many tokens leaves time for."""
        asked = {**asdict(self), "variations": variations}
        usual = asdict(Effort() if tokens <= LONG else FOR_LONG)
        return Effort(**{n: usual[n] if asked[n] is None else asked[n] for n in usual})
