"""Is it yes or no? How four evaluations read an answer, and the scores that follow.

    opera        "." and "," are stripped; "no" where a word is No, not, no, NO or ends in n't; else "yes"
    vcd          looks for the right answer's letters alone: where "yes" is right, a text without "yes" is a "no";
                 where "no" is right, one without "no" (which "know" has) is a "yes"
    lmms_eval    the text, stripped and lower case, must be "yes" or "no" and nothing else; else it is wrong
    vlmevalkit   words; both or neither of "yes" and "no": unknown, which is wrong, and counts as "no" in F1

>>> [rule("Yes.", "yes") for rule in RULES.values()]
['yes', 'yes', 'unknown', 'yes']
>>> [rule("I know it is there", "no") for rule in RULES.values()]
['yes', 'no', 'unknown', 'unknown']
"""

import re
from collections.abc import Callable, Sequence

OPERA_NO = ("No", "not", "no", "NO")


def opera(text: str, truth: str) -> str:
    words = text.replace(".", "").replace(",", "").split(" ")
    return "no" if any(w in OPERA_NO or w.endswith("n't") for w in words) else "yes"


def vcd(text: str, truth: str) -> str:
    plain = text.lower()
    return ("yes" if "yes" in plain else "no") if truth == "yes" else ("no" if "no" in plain else "yes")


def lmms_eval(text: str, truth: str) -> str:
    plain = text.strip().lower()
    return plain if plain in ("yes", "no") else "unknown"


def vlmevalkit(text: str, truth: str) -> str:
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    yes, no = "yes" in words, "no" in words
    return "unknown" if yes == no else "yes" if yes else "no"


RULES: dict[str, Callable[[str, str], str]] = {
    "opera": opera, "vcd": vcd, "lmms_eval": lmms_eval, "vlmevalkit": vlmevalkit,
}  # fmt: skip


def yes_no_scores(said: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", the share of "yes" among what was said, and of unknown answers."""
    pairs = list(zip(said, truth, strict=True))
    hit = sum(s == t == "yes" for s, t in pairs)
    claimed, there = sum(s == "yes" for s, _ in pairs), sum(t == "yes" for _, t in pairs)
    precision, recall = hit / max(claimed, 1), hit / max(there, 1)
    return {
        "accuracy": sum(s == t for s, t in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-12),
        "yes_ratio": claimed / len(pairs),
        "unknown": sum(s == "unknown" for s, _ in pairs) / len(pairs),
    }
