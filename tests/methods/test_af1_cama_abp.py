"""The edits of All-for-One: what reaches the last token goes through the window, and nowhere else."""

import pytest
import torch

from regard import attach
from regard.methods.tracing import af1_cama_abp as page
from regard.testing.zoo import build

LAYERS, TOKENS = 3, 6


def logits(model, ids, cfg, means=None):
    edits = [*(page.cama(means, cfg) if means is not None else ()), *page.abp(TOKENS, LAYERS, cfg)]
    with torch.no_grad(), attach(model, edits):
        return model(input_ids=ids).logits[:, -1]


def moved(cfg, token, means=None):
    """By how much the last logits move when one token is another."""
    model, _ = build("llama")
    ids = torch.randint(3, 100, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, token] = 101
    return float((logits(model, ids, cfg, means) - logits(model, other, cfg, means)).abs().max())


@pytest.mark.parametrize("token", [1, 2, TOKENS - 2])
def test_without_a_window_the_last_token_sees_itself_and_the_first(token):
    assert moved(page.Config(0, 0), token) == 0
    assert moved(page.Config(0, 1), token) > 1e-4
    assert moved(page.Config(0, LAYERS), token) > 1e-4
    assert moved(page.Config(0, 0), 0) > 1e-4
    assert moved(page.Config(0, 0), TOKENS - 1) > 1e-4


@pytest.mark.parametrize("wait", [1, 2, 3])
def test_what_is_replaced_forgets_the_tokens(wait):
    """With the same means, tokens of the prompt make no difference, whatever the window after them."""
    means = torch.randn(1, TOKENS, build("llama")[0].config.hidden_size)
    for token in range(1, TOKENS):
        assert moved(page.Config(wait, LAYERS - wait), token, means) == 0
    assert moved(page.Config(wait, LAYERS - wait), 1) > 1e-4


def test_others_do_not_see_each_other():
    (site,) = {edit.site.layers for edit in page.abp(TOKENS, LAYERS, page.Config(1, 2))}
    assert site == (1, 2)
    rows = {edit.site.rows: edit.site.keys for edit in page.abp(TOKENS, LAYERS, page.Config(1, 1))}
    assert rows == {(q,): tuple(range(1, q)) for q in range(2, TOKENS)}


def test_bad_input_is_refused():
    acts, ids = torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [0, 1, 3]])
    with pytest.raises(ValueError, match="seen at its place"):
        page.measure(acts, ids, torch.tensor([[0, 2, 2]]))
    with pytest.raises(ValueError, match="wait"):
        page.abp(TOKENS, LAYERS, page.Config(2, 2))
