"""TidalDecode: selecting layers attend to all; the layers above read the k keys that were best there, by head."""

from typing import ClassVar

from regard.testing.cache.definition import Definition, Moment, largest


class Written(Definition):
    moves: ClassVar = {
        "budget": ({"budget": 6, "full": 1, "select": (1,)}, {"budget": 0.4, "full": 1, "select": (1,)}),
        "k": ({"k": 6, "full": 1, "select": (1,)}, {"k": 9, "full": 1, "select": (1,)}),
        "select": ({"budget": 6, "full": 1, "select": (1,)}, {"budget": 6, "full": 1, "select": (3,)}),
        # where all layers are full ones, those before the first selecting one have nothing to read and are full
        # whatever this says; a layer that slides a window searches it from here on
        "full": ({"budget": 3, "full": 1, "select": (2,)}, {"budget": 3, "full": 2, "select": (2,)}),
    }
    more = ({"budget": 6, "full": 0, "select": (0, 3)}, {"budget": 1, "full": 0, "select": (0, 2)})
    families: ClassVar = {"full": "mistral"}
    slides: ClassVar = {"budget": 4, "full": 0, "select": (1,)}
    long, layers = 260, 5

    def own_budget(self) -> int:
        return self.cfg.k

    def reads(self, at: Moment) -> list[list[int]] | None:
        if not at.decodes:
            return None
        if at.window is not None:
            return self.searched(at) if at.layer >= self.cfg.full else None
        if at.layer in self.cfg.select:
            self.memory["found"] = self.searched(at)
            return None
        return self.memory["found"] if at.layer > min(self.cfg.select) else None

    def searched(self, at: Moment) -> list[list[int]]:
        found = []
        for h in range(len(at.q)):
            tokens = at.seen(at.n - 1, at.held[at.kv_head(h)])
            scores = at.scores(h, at.n - 1, tokens).tolist()
            found.append(largest(dict(zip(tokens, scores, strict=True)), at.budget))
        return found
