"""Rows of a batch that change places go on as each does alone: under mechanisms, edits on roles, in backbones of ours.

Under cache methods the checks of their kind ask it (testing/cache/rows.py).
"""

import pytest
import torch

from regard import catalog
from regard.attaching.attachment import attach
from regard.attaching.converted import Converted
from regard.attaching.replacement import has_params, sizes
from regard.core import Edit, Site, Unsupported
from regard.nn.backbones import RegardForCausalLM
from regard.nn.cache import StateCache
from regard.nn.config import RegardConfig
from regard.testing.cache import small
from regard.testing.cache.rows import check_moved_rows
from regard.testing.zoo import build

MARK = {"marked": lambda ids: ids % 3 == 0}
MARKED = Edit(Site("scores", keys="marked"), "scale", 0.3)


def causal():
    """Mechanisms that a language model can have in the place of its attention, with settings for short texts."""
    for name, page in catalog.every():
        if page.kind == "mechanism" and "causal_self" in page.patterns and not page.roles:
            yield catalog.method(name, **(page.test_settings[0] if page.test_settings else {}))


def ready(model, method):
    """The method, with random weights where it learns any."""
    if not has_params(method, sizes(model)):
        return method
    torch.manual_seed(1)
    parts = method.page.init(method.config, sizes(model))
    parts = {n: p + 0.2 * torch.randn_like(p) if p.is_floating_point() else p for n, p in parts.items()}
    sites = [f"model.layers.{i}.self_attn" for i in range(model.config.num_hidden_layers)]
    return Converted(method, dict.fromkeys(sites, parts))


@pytest.mark.parametrize("method", causal(), ids=lambda method: method.name)
def test_mechanism(method):
    model, _ = build("llama")
    attached = ready(model, method)
    check_moved_rows(model, lambda: attach(model, attached), said=method.label)


@pytest.mark.parametrize("name", catalog.list_methods(kind="cache"))
def test_cache_method_beside_an_edit_on_a_role(name):
    """What check_cache asks of it by itself, beside labels of tokens, that rows carry with them."""
    model, _ = build("llama")
    method = catalog.method(name, **small(catalog.get(name)))
    around = lambda: attach(model, [method, MARKED], roles=MARK)  # noqa: E731
    # heads that part have lengths of their own, which an edit of all heads cannot act on
    parts = name in ("razor_attention", "duo_attention") or method.page.allocate is not None
    if parts and name not in ("pyramidkv", "layer_entropy", "cake"):  # these part layers alone
        with pytest.raises(Unsupported, match="heads hold different lengths"):
            check_moved_rows(model, around, said=name)
    else:
        check_moved_rows(model, around, said=name)


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "falconh1", "zamba2", "gemma4", "deepseek3", "inkling"]
)
def test_bare_attachment_and_an_edit_on_a_role(family):
    model, _ = build(family)
    check_moved_rows(model, lambda: attach(model), said=family)
    check_moved_rows(model, lambda: attach(model, MARKED, roles=MARK), said=f"an edit on {family}")


@pytest.mark.parametrize("method", ["linear_attention", "softmax"])
@pytest.mark.parametrize("family", ["falconh1", "zamba2"])
def test_states_beside_those_of_a_mechanism(family, method):
    model, _ = build(family)
    check_moved_rows(model, lambda: attach(model, method), said=f"{method} on {family}")


BLOCKS = catalog.list_methods(kind="block", family="decoder")


@pytest.mark.parametrize(
    "mechanisms", [["softmax", "linear_attention", "delta_rule", "gla"], *BLOCKS], ids=str
)
def test_backbone(mechanisms):
    """A StateCache of several mechanisms, with the inputs of a short convolution beside their states."""
    torch.manual_seed(0)
    conv = 3 if isinstance(mechanisms, list) else 0
    config = RegardConfig(mechanisms=mechanisms, vocab_size=128, hidden_size=16, initializer_range=0.3,
                          num_hidden_layers=4, pad_token_id=0, conv=conv)  # fmt: skip
    model = RegardForCausalLM(config).eval()
    takes = "input_ids", "attention_mask"
    check_moved_rows(model, said=str(mechanisms), cache=lambda _: StateCache(), takes=takes)
