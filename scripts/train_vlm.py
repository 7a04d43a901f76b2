"""Train the small vision-language model that regard ships, from nothing, on two CPU cores.

A LLaVA-type model: a CLIP-type tower with a class token, a projector, a LLaMA-type decoder. It sees rendered scenes
(regard.tasks.scenes) of all contrasts and answers seven kinds of questions about them; a share of the questions comes
without an image, so that the decoder knows by itself what usually goes together. What CLIP's pretraining does for the
class token, a head that is thrown away does here: from it, it tells what is on the image.

Every step draws from its own seeded generator.

    python scripts/train_vlm.py --out runs/vlm --steps 3000 --seed 0

The commands that made the shipped model are in its CARD.md.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import LlavaForConditionalGeneration
from vlm_model import ID, MEAN, STD, TOKENS, new_model, save

from regard.tasks.scene_questions import ASKED, Question
from regard.tasks.scenes import CLEAR, DIGITS, FAINT, LETTERS, MIXED, PAIRS, Scene, Scenes

# how often a question of each kind is asked, before step 3,000 of a run from nothing and from there on
FIRST = {
    "exists": 0.27,
    "describe": 0.25,
    "count": 0.1,
    "word": 0.14,
    "digit": 0.06,
    "colour": 0.06,
    "where": 0.12,
}
SHARES = {
    "exists": 0.32,
    "describe": 0.16,
    "count": 0.08,
    "word": 0.18,
    "digit": 0.06,
    "colour": 0.04,
    "where": 0.16,
}
WITHOUT_IMAGE, BATCH, EVERY, AUXILIARY = 0.06, 64, 250, 0.5
LABELS = (*PAIRS, *DIGITS, *LETTERS)


def ids_of(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


def pixels_of(scenes: list[Scene]) -> Tensor:
    """[B, 3, 32, 32], as the processor gives them."""
    stacked = torch.from_numpy(np.stack([scene.pixels() for scene in scenes])).float() / 255
    return (stacked.permute(0, 3, 1, 2) - MEAN) / STD


def question_of(scene: Scene, rng: random.Random, shares: dict, kind: str | None = None) -> Question:
    while True:
        name = kind or rng.choices(list(shares), list(shares.values()))[0]
        question = ASKED[name](scene, rng)
        if question is not None:
            return question


def row_of(question: Question, image: bool) -> tuple[list[int], list[int]]:
    """Ids, and labels that score the answer alone."""
    before = [ID["<s>"]] + [ID["<image>"]] * (TOKENS * image) + ids_of(question.text)
    answer = [*ids_of(question.answer), ID["</s>"]]
    return before + answer, [-100] * len(before) + answer


def labels_of(scene: Scene) -> list[float]:
    """What the class token should know: which coloured shapes, digits and letters are there."""
    there = {*scene.shapes, *(t.name for t in scene.of("digit")), *"".join(t.name for t in scene.of("word"))}
    return [float(label in there) for label in LABELS]


def batch_at(seed: int, step: int) -> tuple[dict[str, Tensor], Tensor]:
    scenes, shares = Scenes(f"{seed} {step}"), FIRST if step < 3000 else SHARES
    rows, seen = [], []
    for scene in scenes.many(BATCH):
        image = scenes.rng.random() >= WITHOUT_IMAGE
        kind = None if image else scenes.rng.choice(["exists", "describe", "colour"])
        if kind == "colour" and not scene.of("digit"):
            kind = "describe"
        rows.append(row_of(question_of(scene, scenes.rng, shares, kind), image))
        if image:
            seen.append(scene)
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [ID["<pad>"]] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
    inputs = dict(input_ids=ids, labels=labels, attention_mask=mask, pixel_values=pixels_of(seen))
    return inputs, torch.tensor([labels_of(scene) for scene in seen])


@torch.no_grad()
def examined(model, kind: str, count: int, seed: str = "exam", **how) -> float:
    """Share of questions of a kind whose whole answer is the most likely one, token by token."""
    scenes, right, asked = Scenes(seed, **how), 0, 0
    while asked < count:
        chosen = [(s, q) for s in scenes.many(64) if (q := ASKED[kind](s, scenes.rng)) is not None]
        for scene, question in chosen:
            ids, labels = row_of(question, True)
            out = (
                model(input_ids=torch.tensor([ids]), pixel_values=pixels_of([scene]))
                .logits[0, :-1]
                .argmax(-1)
            )
            wanted = torch.tensor(labels[1:])
            right += bool((out == wanted)[wanted >= 0].all())
        asked += len(chosen)
    return right / asked


@torch.no_grad()
def chair(model, count: int, seed: str = "exam", **how) -> tuple[float, float]:
    """CHAIR_I and recall of coloured shapes in greedy captions."""
    scenes = Scenes(seed, **how).many(count)
    prompt = [ID["<s>"]] + [ID["<image>"]] * TOKENS + ids_of("describe the image .")
    ids = torch.tensor([prompt] * count)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels_of(scenes), max_new_tokens=28,
        do_sample=False,
    )[:, len(prompt) :]  # fmt: skip
    words, false, named, found, there = list(ID), 0, 0, 0, 0
    for scene, row in zip(scenes, out.tolist()):
        text = " ".join(words[i] for i in row).split("</s>")[0]
        said = {pair for pair in PAIRS if f"a {pair[0]} {pair[1]}" in text}
        false, named = false + len(said - {*scene.shapes}), named + len(said)
        found, there = found + len(said & {*scene.shapes}), there + len(scene.shapes)
    return round(false / max(named, 1), 3), round(found / there, 3)


def report(model, count: int) -> dict:
    model.eval()
    facts = {
        "clear": {kind: round(examined(model, kind, count, contrast=CLEAR), 3) for kind in ASKED},
        "chair_clear": chair(model, count, contrast=CLEAR),
        "chair_clear_conflict": chair(model, count, contrast=CLEAR, conflict=True),
        "chair_faint": chair(model, count, contrast=FAINT),
        "chair_faint_conflict": chair(model, count, contrast=FAINT, conflict=True),
        "chair_mixed": chair(model, count, contrast=MIXED),
        "chair_mixed_conflict": chair(model, count, contrast=MIXED, conflict=True),
    }
    model.train()
    return facts


def optimizers(model, head: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers and projector and AdamW for the rest, or AdamW for all."""
    inner = (".layers.", "multi_modal_projector")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and any(part in n for part in inner)]
    chosen = {id(p) for p in matrices} if args.optimizer == "muon" else set()
    rest = [p for p in (*model.parameters(), *head.parameters()) if id(p) not in chosen]
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, args.rate, weight_decay=0.05)]
    if chosen:
        made.append(
            torch.optim.Muon(matrices, 2 * args.rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-3, help="of AdamW; Muon's is twice that")
    parser.add_argument("--start", type=Path, help="a folder of an earlier run, whose weights it begins with")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--until", type=int, help="stop there, before the rate has come down")
    parser.add_argument("--first", type=int, default=0, help="the step to count from")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    model = new_model(args.seed).train()
    if args.start:
        model.load_state_dict(LlavaForConditionalGeneration.from_pretrained(args.start).state_dict())
    head = nn.Linear(model.config.vision_config.hidden_size, len(LABELS))
    print(sum(p.numel() for p in model.parameters()), "weights", flush=True)
    made = optimizers(model, head, args)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            o, o.param_groups[0]["lr"], args.steps, pct_start=0.03, cycle_momentum=False
        )
        for o in made
    ]
    pooled: list[Tensor] = []
    tower = model.model.vision_tower
    tower.register_forward_hook(lambda module, inputs, out: pooled.append(out.pooler_output))
    start = time.time()
    with open(args.out / "curve.jsonl", "w") as curve:
        for step in range(args.until or args.steps):
            inputs, labels = batch_at(args.seed, args.first + step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**inputs).loss
                known = binary_cross_entropy_with_logits(head(pooled[-1]).float(), labels)
            pooled.clear()
            (loss + AUXILIARY * known).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(made, schedules):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            last = step + 1 == (args.until or args.steps)
            if (step + 1) % EVERY == 0 or last:
                facts = report(model, 512 if last else 64) if last or (step + 1) % (4 * EVERY) == 0 else {}
                pooled.clear()
                now = {"step": args.first + step + 1, "seconds": round(time.time() - start)}
                row = {**now, "loss": round(loss.item(), 4), "class_token": round(known.item(), 4), **facts}
                print(json.dumps(row), file=curve, flush=True)
                print(json.dumps(row), flush=True)
                save(model, args.out)


if __name__ == "__main__":
    main()
