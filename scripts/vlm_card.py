"""The numbers of the shipped vision-language model's CARD.md, as Markdown.

python scripts/vlm_card.py --count 512
"""

import argparse

import torch

from regard.claims.shipped_vlm import accuracy, asked, asked_partners, captions, chair, said_yes, shipped
from regard.tasks.scene_questions import ASKED
from regard.tasks.scenes import CLEAR, FAINT, MIXED, Scenes

CONTRASTS = {"clear": CLEAR, "mixed": MIXED, "faint": FAINT}
SEED = "card"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def plain(count: int) -> list[str]:
    kinds = [kind for kind in ASKED if kind != "describe"]
    lines = [f"| contrast | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    for name, contrast in CONTRASTS.items():
        shares = [accuracy(None, asked(kind, count, SEED, contrast=contrast)) for kind in kinds]
        lines.append(f"| {name} | {' | '.join(map(percent, shares))} |")
    return lines


def hallucination(count: int) -> list[str]:
    lines = [
        "| scenes | contrast | CHAIR_I | recall | partner asked for: said yes | right |",
        "|---|---|---|---|---|---|",
    ]
    for conflict in (False, True):
        for name, contrast in CONTRASTS.items():
            scenes = Scenes(SEED, conflict, contrast).many(count)
            false, recall = chair(captions(None, scenes), scenes)
            questions = asked_partners(count, SEED, conflict=conflict, contrast=contrast)
            yes = said_yes(None, questions)
            partners = [y for y, i in zip(yes, range(count)) if i % 2 == 0]
            right = [y == (q.question.answer == "yes") for y, q in zip(yes, questions, strict=True)]
            shares = (false, recall, sum(partners) / len(partners), sum(right) / len(right))
            what = "break the priors" if conflict else "follow the priors"
            lines.append(f"| {what} | {name} | {' | '.join(map(percent, shares))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = shipped().model
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M weights; {args.count} questions each\n")
    print("\n".join([*plain(args.count), "", *hallucination(args.count)]))


if __name__ == "__main__":
    main()
