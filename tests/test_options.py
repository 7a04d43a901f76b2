"""Every option of every page moves its result; where one alone does not, the table says why, and is held to it."""

from dataclasses import fields
from itertools import pairwise

import pytest
import torch

from regard import catalog
from regard.core import Method, Unsupported
from regard.testing.labels import example_roles
from regard.testing.options import changes, moving
from regard.testing.pictures import batch
from regard.testing.steering import steered
from regard.testing.tokens import answers

KINDS = ("mechanism", "mask", "position", "block", "steering", "tokens")
PAGES = [name for name, page in catalog.every() if page.kind in KINDS and fields(page.config)]
BY_LAYER = "acts by the number of a layer, which a page alone is not told"
EQUAL = "block_q and block_k are one number: neither changes alone"
ONE = "has one value only"
SEARCH = ("beams", "candidates", "sigma", "alpha", "unit", "patience", "rollbacks")
# (page, or * for all; field) -> why no other value of it alone moves the result
ALONE = {
    ("*", "dense_layers"): BY_LAYER,
    ("flexprefill", "block_q"): EQUAL,
    ("flexprefill", "block_k"): EQUAL,
    ("rectified_spaattn", "block_q"): EQUAL,
    ("rectified_spaattn", "block_k"): EQUAL,
    ("superlinear_attention", "block_q"): ONE,
    ("superlinear_attention", "block_k"): ONE,
    ("dhsa", "block_k"): ONE,
    ("routing_transformer", "decay"): "of the centroids while a model is trained; a forward moves none",
    (
        "agent_attention",
        "grid",
    ): "a grid is of as many tokens as the text, and goes with others of its settings",
    ("davit", "layers"): "how many there are; whose turn a layer is follows from its own number",
    ("flux_attention", "pool"): "which tokens the router reads; the decision on these texts stays",
    ("dola", "stop"): "where the candidates end: of three layers the same one is chosen",
    ("edit_a_video", "frames"): "in the attention of a diffusion transformer, which its cases do not run",
    ("ir_diffusion", "subjects"): "how many roles are read; a prompt without these roles has none",
    ("pine", "documents"): "the name of a role; no other role numbers documents",
    ("vhd_vhr", "hides"): "the name of a role; no other role is known",
    ("vista", "hides"): "the name of a role; no other role is known",
    (
        "act_attention_calibration",
        "heads",
    ): "of heads that were measured: a tuple of pairs, or all that measure",
    ("var", "first"): "layers before it are left; the sinks are in none of the few layers",
    ("dyvte", "routers"): "learned routers, or a file of them",
    ("quota", "relevance"): "a score for each image; of one image the whole budget",
    ("fastervlm", "without_class"): "for towers without a class token",
    ("vtc_cls", "without_class"): "for towers without a class token",
    ("token_correlation_compression", "without_class"): "for towers without a class token",
    **{("opera", name): "of a search, which takes the place of generate" for name in SEARCH},
}


def moved_on_a_model(name, page, field):
    """Whether logits of llava change with another value of the field, steered or with fewer visual tokens."""
    model, inputs = batch("llava")
    configs = dict.fromkeys(page.configure(**options) for options in (*page.test_settings, {}))

    def logits(cfg):
        method = Method(name, page, cfg)
        if page.kind == "tokens":
            return answers(method, model, inputs, "mask", steps=2)[0]
        return steered(method, model, inputs, steps=2)

    for cfg in configs:
        base = None
        for other in [*changes(cfg, field)][:6]:
            try:
                base = logits(cfg) if base is None else base
                if not torch.equal(logits(other), base):
                    return True
            except (Unsupported, ValueError, KeyError, RuntimeError):
                continue
    return False


@pytest.mark.parametrize("name", PAGES)
def test_every_option_moves_the_result(name):
    torch.set_num_threads(1)
    page = catalog.get(name)
    # what is so for all pages is asked of one
    everywhere = {field for of, field in ALONE if of == "*"} if name != "block_topk" else set()
    idle = {field for field, change in moving(page, everywhere).items() if change is None}
    if page.kind in ("steering", "tokens"):
        idle = {field for field in idle if not moved_on_a_model(name, page, field)}
    known = {field for of, field in ALONE if of in ("*", name) and hasattr(page.config(), field)}
    assert idle == known - everywhere, "of these no other value moves the result, or one does that should not"


# (mask page, settings, field, more): whether a larger value shows more keys, or fewer
SHOWN = (
    ("window", {"window": 9}, "window", True),
    ("sinks", {"sinks": 2, "window": 5}, "window", True),
    ("sinks", {"sinks": 2, "window": 5}, "sinks", True),
    ("prefix", {}, "prefix", True),
    ("power_attention", {"local": 2, "sinks": 1, "block": 2}, "local", True),
    ("power_attention", {"local": 2, "sinks": 1, "block": 2}, "sinks", True),
    ("moa_spans", {"alpha": (3.0, 9.0), "beta": (0.0, 0.0), "block": 2}, "sinks", True),
    ("s2_attention", {"heads": 4, "kv_heads": 4, "stride": 4, "local": 1, "block": 2}, "local", True),
    ("s2_attention", {"heads": 8, "kv_heads": 8, "stride": 4, "local": 1, "block": 2}, "stride", False),
    ("sinklora", {"heads": 4, "group": 8}, "sinks", True),
)


@pytest.mark.parametrize(("name", "settings", "field", "more"), SHOWN)
def test_a_larger_mask_setting_shows_more(name, settings, field, more):
    """Or fewer, where it says so: what a smaller one shows is all there, and in the end something else beside it."""
    page, seen = catalog.get(name), []
    for value in (1, 2, 4, 8):
        mask = page.build(page.configure(**{**settings, field: value}))
        seen.append(mask.dense(40, roles=example_roles(mask.needs, 40)))
    for few, many in pairwise(seen if more else seen[::-1]):
        assert not (few & ~many).any()
    assert seen[-1].sum() != seen[0].sum()
