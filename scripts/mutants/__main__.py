"""Faults planted one at a time, and whether a test sees each: the kept list, and a seeded sample of mutations.

    python scripts/mutants planted [FILE.toml ...]      # tests/mutants: every fault under the law that must see it
    python scripts/mutants sample --count 150 --seed 0  # mutations by cosmic-ray, under the tests that reach them:
                                                        # what make test asks runs once before, to see which do
    python scripts/mutants table                        # what was found, by room

Each fault lies in a copy of the tree of its own; tests run there on one thread, `--workers` copies beside each other.
Outcomes are written as they come (`runs/mutants`), and the same command goes on where it was stopped. The exit status
is 1 where a fault of the kept list was not seen.
"""

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import kept
import reach
import sampled
from trees import BROKEN, Mutant, outcomes

OUT = Path("runs/mutants")
LONGER = "claims_longer.toml"  # an hour by itself: planted where it is named
# tests that run so many times longer than measured, and what pytest needs to start, never end
SLOWER, START = 4, 120


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("planted", "sample", "table"))
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        help=f"of the kept list; all of tests/mutants but {LONGER} if none is named",
    )
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--limit", type=float, default=180, help="seconds of tests that a mutant of the sample is given"
    )
    parser.add_argument("--again", action="store_true", help="forget what was found before")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if args.what == "planted":
        return planted(args)
    if args.what == "sample":
        mutants = sampled.mutants(args.count, args.seed)
        found = reach.known(OUT / f"reach-{args.seed}.json", mutants, args.workers)
        mutants = [replace(m, tests=found.within(m, args.limit)) for m in mutants]
        random.Random(args.seed).shuffle(mutants)  # what is found by the time of a stop is a sample too
        run(mutants, OUT / f"sample-{args.seed}.jsonl", args)
    return table(args)


def planted(args: argparse.Namespace) -> int:
    faults = kept.load(args.files or [p for p in sorted(kept.FOLDER.glob("*.toml")) if p.name != LONGER])
    mutants = [fault.mutant() for fault in faults if not fault.equivalent]
    failing = kept.failing_laws(mutants, args.limit, args.workers)
    laws = {law for mutant in mutants for law in mutant.tests}
    print(f"{len(laws) - len(failing)} of {len(laws)} laws pass on the tree as it is", file=sys.stderr)
    rows = run([m for m in mutants if not {*m.tests} & {*failing}], OUT / "planted.jsonl", args)
    unseen = [row for row in rows if row["outcome"] != "seen"]
    same = sum(bool(fault.equivalent) for fault in faults)
    print(
        f"planted faults: {len(rows) - len(unseen)} of {len(rows)} seen; {same} that change nothing, with a reason"
    )
    for row in unseen:
        print(f"  {row['outcome']:8} {row['file']}: {row['name']}")
    for law, line in failing.items():
        print(f"  {law} fails on the tree as it is, so that it was asked of no fault: {line[:200]}")
    return int(bool(unseen or failing))


def run(mutants: list[Mutant], out: Path, args: argparse.Namespace) -> list[dict]:
    """A row for each mutant, in their order; those of the same mutant and tests from before stand.

    One whose tests could not be run, which is no outcome of theirs, is asked once more, and by every later run.
    """
    rows = {} if args.again or not out.exists() else {row["key"]: row for row in read(out)}
    with open(out, "w" if args.again else "a") as file:
        for _ in range(2):
            todo = [m for m in mutants if m.key not in rows or rows[m.key]["outcome"] == BROKEN]
            for n, (mutant, row) in enumerate(outcomes(todo, args.workers, SLOWER * args.limit + START), 1):
                rows[mutant.key] = row
                print(json.dumps(row), file=file, flush=True)
                where = f"{n} of {len(todo)}"
                print(
                    f"{where:12} {row['outcome']:8} {row['seconds']:6.1f} s  {mutant.file}: {mutant.name}",
                    file=sys.stderr,
                )
    return [rows[m.key] for m in mutants]


def read(path: Path) -> list[dict]:
    """The last row of each mutant."""
    rows = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    return [*{row["key"]: row for row in rows}.values()]


def table(args: argparse.Namespace) -> int:
    path = OUT / f"sample-{args.seed}.jsonl"
    rows = read(path) if path.exists() else []
    print(sampled.by_room(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
