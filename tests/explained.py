"""Made-up findings of `regard explain`, all parts of them, for the tests of their page."""

import random

from tests.test_report import BREAKOUT, HOSTILE

WORDS = (
    "The",
    "capital",
    "of",
    "France",
    "is",
    "Paris",
    ",",
    "a",
    "large",
    "city",
    "on",
    "the",
    "river",
    "Seine",
)
EVIL = [
    HOSTILE,
    BREAKOUT,
    "\u202eright",
    "שלום",
    "مرحبا",
    "\x1b[31m",
    "\u200b",
    "\n\n",
    "\t",
    "\ud800",
    "&amp;",
    "'\"",
    "<!--",
]


def interval(mean, half=0.06):
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def curve(places, means, half, over="k"):
    rows = [interval(m, half) for m in means]
    return {over: places} | {key: [r[key] for r in rows] for key in ("mean", "low", "high")}


def fake(tokens=90, layers=12, heads=9, seed=0, extra=()):
    """All parts, as `regard explain` hands them over."""
    rng = random.Random(seed)
    text = ["The"] + [" " + rng.choice(WORDS) for _ in range(tokens - 1)]
    for i, token in enumerate(extra):
        text[3 + 2 * i] = token
    if tokens > 30:
        text[tokens // 2] = ".\n"
    place = tokens // 3
    text[place] = " Paris"

    def scores(noise, strength):
        out = [round(rng.gauss(0, noise), 4) for _ in text]
        return [
            round(v + strength * (i == place) - 0.4 * strength * (i == place + 9), 4)
            for i, v in enumerate(out)
        ]

    def source(method, strength, means, lds, control=False):
        made = {"method": method, "scores": scores(0.05, strength), "control": control}
        return made | {"drop": curve([1, 2, 4, 8], means, 0.2), "lds": lds and interval(lds)}

    def attention():
        weights = [rng.random() ** 8 / tokens for _ in text]
        weights[0], weights[place] = 0.5, 0.3
        return {"query": tokens - 1, "weights": [round(w, 5) for w in weights]}

    effect = [[round(rng.gauss(0, 0.02), 4) for _ in range(heads)] for _ in range(layers)]
    best = [
        (layers // 4, 2, 0.41),
        (layers // 2, heads - 2, 0.22),
        (layers - 2, 1, 0.12),
        (layers - 1, 0, -0.17),
    ]
    best += [(layers - 3, 3, 0.05)]
    for layer, head, value in best:
        effect[layer][head] = value
    spread = {
        key: [[round(v + d, 4) for v in row] for row in effect] for key, d in (("low", -0.05), ("high", 0.05))
    }
    mlp = [round(abs(rng.gauss(0, 0.05)), 4) for _ in range(layers)]
    mlp[0] = 0.9
    exact = [
        [(i, j) in {b[:2] for b in best} or rng.random() < 0.1 for j in range(heads)] for i in range(layers)
    ]
    why = [
        {"query_part": f"layer {i} head {j}", "key_part": key, "share": share}
        for i, j, key, share in (
            (2, 1, "embedding", 0.31),
            (0, 4, "layer 1 MLP", 0.22),
            (1, 0, "positions", 0.04),
        )
    ]
    return {
        "model": "SmolLM2-135M-Instruct",
        "revision": "abc123",
        "command": "regard explain --model SmolLM2-135M-Instruct --prompt prompt.txt --target ' Paris' --foil ' Rome'",
        "prompt_name": "prompt.txt",
        "pairs": 8,
        "tokens": text,
        "target": " Paris",
        "foil": " Rome",
        "metric": "logit difference",
        "clean": 3.1,
        "corrupt": -2.0,
        "corruption": "every ' Paris' of the prompt became ' Rome' (3 tokens)",
        "direction": "denoise",
        "sources": [
            source("gradient", 0.9, [1.2, 2.0, 2.9, 3.4], 0.71),
            source("integrated gradients", 0.8, [1.1, 1.7, 2.6, 3.2], 0.66),
            source("attention rollout", 0.3, [0.3, 0.4, 0.8, 1.2], 0.2),
            source("random", 0.0, [0.0, 0.1, 0.1, 0.3], None, control=True),
        ],
        "effects": {"layers": list(range(layers)), "heads": heads, "mean": effect, **spread, "exact": exact}
        | {"mlp": curve(list(range(layers)), mlp, 0.04, "at") | {"exact": [i < 2 for i in range(layers)]}}
        | {"normalised": True, "spearman": 0.95},
        "heads": [
            {"layer": i, "head": j, **interval(v), "attention": attention(), "why": why if n < 2 else None}
            for n, (i, j, v) in enumerate(best)
        ],
        "controls": [
            {"name": "top 5 heads together", **interval(0.78), "control": False},
            {"name": "5 random heads of the same layers, 20 draws", **interval(0.02, 0.04), "control": True},
            {"name": "random directions of the same norm", **interval(-0.01, 0.02), "control": True},
        ],
        "graph": graph(rng, best, layers),
        "faithfulness": curve(
            [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0], [0.1, 0.35, 0.6, 0.8, 0.9, 0.97, 1.0], 0.05, "share"
        )
        | {"cpr": 0.8, "cmd": 0.2, "ablation": "resample", "signed": True},
        "tested": [
            "Heads: the top 5 against 5 random heads of the same layers, 20 draws.",
            f"Tokens: the top 8 of each method against 8 random ones {HOSTILE}.",
        ],
        "seconds": 41.0,
    }


def graph(rng, best, layers):
    names = [f"L{i}H{j}" for i, j, _ in best]
    small = [f"L{i}H{j}" for i, j in ((0, 1), (0, 4), (1, 0), (1, 5), (2, 1))]
    nodes = [
        {"id": "embedding", "layer": -1, "kind": "embedding"},
        {"id": "logits", "layer": layers, "kind": "logits"},
    ]
    nodes += [{"id": n, "layer": int(n[1 : n.index("H")]), "kind": "head"} for n in [*names, *small]]
    nodes += [{"id": f"L{i}M", "layer": i, "kind": "mlp"} for i in (0, layers - 2)]
    edges = [{"from": n, "to": "logits", "score": v} for n, (_, _, v) in zip(names, best, strict=True)]
    edges += [
        {"from": s, "to": f"{names[0]}.{rng.choice('qkv')}", "score": rng.gauss(0.02, 0.05)} for s in small
    ]
    edges += [
        {"from": "embedding", "to": f"{s}.{p}", "score": rng.gauss(0, 0.05)} for s in small for p in "kv"
    ]
    edges += [
        {"from": names[0], "to": f"{n}.{p}", "score": rng.gauss(0.1, 0.1)} for n in names[1:] for p in "qv"
    ]
    edges += [
        {"from": "embedding", "to": "L0M", "score": 0.3},
        {"from": "L0M", "to": f"{names[0]}.k", "score": 0.25},
    ]
    edges += [{"from": names[1], "to": f"L{layers - 2}M", "score": 0.1}]
    edges += [
        {"from": f"L{layers - 2}M", "to": "logits", "score": -0.12},
        {"from": "embedding", "to": "logits", "score": 0.1},
    ]
    return {"nodes": nodes, "edges": edges, "of": 12345}


def hostile():
    """Hostile text wherever text can be."""
    found = fake(extra=EVIL)
    evil = f"{BREAKOUT}\u202e\x1b[31m\n{HOSTILE}"
    for key in (
        "model",
        "revision",
        "command",
        "prompt_name",
        "target",
        "foil",
        "metric",
        "corruption",
        "direction",
    ):
        found[key] = evil
    for row in (*found["sources"], *found["controls"]):
        row["method" if "method" in row else "name"] = evil
    found["heads"][0]["why"] = [{"query_part": evil, "key_part": evil, "share": 0.5}]
    old, new = found["graph"]["nodes"][2]["id"], evil.replace(".", "_")
    found["graph"]["nodes"][2]["id"] = new
    for edge in found["graph"]["edges"]:
        edge |= {key: edge[key].replace(old, new) for key in ("from", "to")}
    found["faithfulness"]["ablation"] = evil
    found["tested"] = [evil]
    return found
