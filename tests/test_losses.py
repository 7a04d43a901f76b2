"""The loss of our models is the cross-entropy of their logits, written out; and a moved mass is all there again."""

import math

import pytest
import torch

from regard.attaching.verbs import moved
from regard.nn import RegardConfig, RegardForCausalLM, RegardForMaskedLM, RegardForSeq2SeqLM

IDS = torch.randint(1, 32, (3, 6), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])


def built(model_class):
    torch.manual_seed(0)
    config = RegardConfig(vocab_size=32, hidden_size=16, initializer_range=0.3, pad_token_id=0,
                          decoder_start_token_id=1, mechanisms="softmax")  # fmt: skip
    return model_class(config).double().eval()


def by_hand(logits, labels, ahead):
    """The mean over what is scored of -log p(label), label i + ahead under logits i; and how many are scored."""
    losses = []
    for row, names in zip(logits.tolist(), labels.tolist(), strict=True):
        for scores, label in zip(row, names[ahead:]):
            if label != -100:
                top = max(scores)
                losses.append(top + math.log(sum(math.exp(s - top) for s in scores)) - scores[label])
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("hidden", ["none", "padding", "some", "the first", "the last"])
@pytest.mark.parametrize(
    ("model_class", "ahead"), [(RegardForCausalLM, 1), (RegardForMaskedLM, 0), (RegardForSeq2SeqLM, 0)]
)
def test_loss_is_the_cross_entropy_by_hand(model_class, ahead, hidden):
    """A causal model is scored on the token after each, the others on the labels under their own tokens."""
    model, labels = built(model_class), IDS.roll(1, 1).clone()
    if hidden == "padding":
        labels[PADDED == 0] = -100
    elif hidden == "some":
        labels[0, 1:4], labels[2, 5] = -100, -100
    elif hidden != "none":
        labels[:, 0 if hidden == "the first" else -1] = -100
    asked = {"decoder_input_ids": IDS.flip(1)} if model_class is RegardForSeq2SeqLM else {}
    mask = PADDED if hidden == "padding" else None
    with torch.no_grad():
        out = model(IDS, attention_mask=mask, labels=labels, **asked)
        wanted, count = by_hand(out.logits, labels, ahead)
        assert out.loss.item() == pytest.approx(wanted, rel=1e-9)
        part = model(IDS, attention_mask=mask, labels=labels, num_items_in_batch=40, **asked).loss
    assert part.item() == pytest.approx(wanted * count / 40, rel=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("empty", [False, True])
def test_a_moved_mass_is_all_there_again(share, empty):
    """From keys to others, some of them both: nothing is lost where the others have no mass at all."""
    w = torch.rand(2, 3, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    source, to = torch.zeros(7, dtype=torch.bool), torch.zeros(7, dtype=torch.bool)
    source[[1, 3, 4]], to[[4, 6]] = True, True
    if empty:
        w[..., to] = 0
    w = w / w.sum(-1, keepdim=True)
    new = moved(w, source, to, share)
    torch.testing.assert_close(new.sum(-1), torch.ones(2, 3, 4, dtype=torch.float64))
    torch.testing.assert_close(new[..., [1, 3]], (1 - share) * w[..., [1, 3]])
    torch.testing.assert_close(new[..., [0, 2, 5]], w[..., [0, 2, 5]], rtol=0, atol=0)
    taken = share * w[..., source].sum(-1, keepdim=True)
    there = w[..., [4, 6]]
    parts = torch.full_like(there, 0.5) if empty else there / there.sum(-1, keepdim=True)
    left = there * torch.tensor([1 - share, 1.0], dtype=torch.float64)
    torch.testing.assert_close(new[..., [4, 6]], left + taken * parts)
    nowhere = moved(w, source, torch.zeros_like(to), share)
    assert torch.equal(nowhere, w)
