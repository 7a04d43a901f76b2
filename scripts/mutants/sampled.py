"""A seeded sample of mutations by cosmic-ray: as many places of each room, one mutation at each."""

import ast
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from trees import LATE, ROOT, SEEN, UNCOLLECTED, Mutant

SOURCE = "src/regard"
ROOMS = {
    "ops": ["ops"],
    "attach": ["attaching"],
    "caches": ["methods/caches"],
    "masks": ["methods/masks", "core/mask.py", "core/lowering.py", "core/tiling.py"],
    "bench": ["bench"],
    "report": ["report"],
    "tasks": ["tasks"],
    "train": ["train"],
}
# names that begin so: variables that are put in at random, and decorators that go, say little
OPERATORS = (
    "core/Replace", "core/AddNot", "core/NumberReplacer", "core/ZeroIterationForLoop", "core/ExceptionReplacer",
)  # fmt: skip


class Place(NamedTuple):
    file: str
    start: tuple[int, int]
    kind: str  # what is replaced: the operator's name up to what stands there instead


def mutants(count: int, seed: int) -> list[Mutant]:
    """Without tests: who reaches them is not known here. One fewer for each place where no mutation is a program."""
    rng, found = random.Random(seed), []
    for n, (room, parts) in enumerate(ROOMS.items()):
        share = count // len(ROOMS) + (n < count % len(ROOMS))
        places = sorted(places_of(parts))
        for place in rng.sample(places, min(share, len(places))):
            found.append(mutated(place, room, rng))
    return [mutant for mutant in found if mutant is not None]


def places_of(parts: list[str]) -> Iterator[Place]:
    for part in parts:
        path = ROOT / SOURCE / part
        files = [path] if path.is_file() else sorted(path.rglob("*.py"))
        for file in files:
            # Triton's kernels do not run without a GPU
            if file.exists() and "triton" not in file.name:
                yield from {place for place, _, _ in mutations(file)}


@cache
def mutations(file: Path) -> list[tuple[Place, str, int]]:
    """(place, operator, which of its occurrences) of all mutations of a file that change what it does."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = file.read_text()
    tree, skipped = get_ast(source), types_and_decorators(source)
    name, found = str(file.relative_to(ROOT)), []
    for operator in filter(lambda o: o.startswith(OPERATORS), operator_names()):
        made, occurrence = get_operator(operator)(), 0
        for node in ast_nodes(tree):
            for start, _ in made.mutation_positions(node):
                if not any(low <= start < high for low, high in skipped):
                    kind = operator.rpartition("_")[0] or operator
                    found.append((Place(name, start, kind), operator, occurrence))
                occurrence += 1
    return found


def types_and_decorators(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans of annotations, of types with a name and of decorators."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        parts: list[ast.AST | None] = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        parts += getattr(node, "decorator_list", [])
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.BinOp | ast.Subscript)
            and not node.col_offset
        ):
            parts.append(node.value)
        spans += [
            ((p.lineno, p.col_offset), (p.end_lineno, p.end_col_offset))
            for p in parts
            if isinstance(p, ast.expr)
        ]
    return spans


def mutated(place: Place, room: str, rng: random.Random) -> Mutant | None:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    here = [(o, n) for p, o, n in mutations(ROOT / place.file) if p == place]
    source = (ROOT / place.file).read_text()
    others = random.Random(f"{place}").sample(here, len(here))
    texts = (mutate_code(source, get_operator(o)(), n) for o, n in (rng.choice(here), *others))
    text = next((text for text in texts if compiles(text)), None)
    if text is None:
        return None
    line = place.start[0]
    after = text.splitlines()[line - 1].strip()
    return Mutant(f"{line}: {source.splitlines()[line - 1].strip()} -> {after}", place.file, text, room=room)


def compiles(text: str | None) -> bool:
    """Without a warning either: what cannot be imported says nothing of tests."""
    try:
        with warnings.catch_warnings(action="error"):
            compile(text or "1 +", "mutant", "exec")
    except (SyntaxError, SyntaxWarning):
        return False
    return True


def by_room(rows: list[dict]) -> str:
    """Markdown: of each room how many were seen, also by tests that never end or can no longer be collected."""
    lines = [
        "| room | mutants | seen | of them late | unseen | no test | score |",
        "|---|---|---|---|---|---|---|",
    ]
    for room in [*ROOMS, "all"]:
        count = Counter(row["outcome"] for row in rows if room in ("all", row["room"]))
        total, seen = sum(count.values()), count[SEEN] + count[LATE] + count[UNCOLLECTED]
        score = f"{100 * seen / total:.0f} %" if total else ""
        lines.append(
            f"| {room} | {total} | {seen} | {count[LATE]} | {count['unseen']} | {count['unreached']} | {score} |"
        )
    return "\n".join(lines)
