"""Multiverse Attention: the numbers of the authors' code, a text that grows, padding, and tags that do not fit."""

import pytest
import torch

from regard.core.mask import causal
from regard.core.roles import Roles
from regard.methods.positions import multiverse_attention as page

PARALLEL, PATH = (1, 2), (3, 4)
# w w <P> <G> w </G> <Path> w w w </Path> <Path> w <P> <G> </G> <Path> w </Path> <Path> w w </Path> <C> w </C> </P> w
# </Path> <Path> </Path> <C> w w </C> </P> w, where 5 to 8 are the tags of goal and conclusion
NESTED = [9, 9, 1, 5, 9, 6, 3, 9, 9, 9, 4, 3, 9, 1, 5, 6, 3, 9, 4, 3, 9, 9, 4, 7, 9, 8, 2, 9, 4, 3, 4,
          7, 9, 9, 8, 2, 9]  # fmt: skip
# what train/utils.py of the authors gives for it: positions, and how many keys each token sees
POSITIONS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 6, 7, 8, 9, 10, 11, 12, 13, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 6, 7,
             21, 22, 23, 24, 25, 26]  # fmt: skip
KEYS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 7, 8, 9, 10, 11, 12, 13, 14, 12, 13, 14, 15, 19, 20, 21, 22, 23, 24, 7, 8,
        32, 33, 34, 35, 36, 37]  # fmt: skip


def roles_of(ids):
    return page.read_roles(torch.tensor(ids), PARALLEL, PATH)


def test_the_numbers_of_the_authors_code():
    roles, cfg = roles_of(NESTED), page.Config()
    assert page.positions(roles, cfg).tolist() == POSITIONS
    assert page.build(cfg).dense(len(NESTED), roles=roles)[0, 0].sum(-1).tolist() == KEYS


def test_positions_are_one_more_than_the_largest_that_is_seen():
    """The rule itself, token by token, also where words stand between the paths of a block."""
    ids = [9, 1, 9, 3, 9, 9, 4, 9, 3, 9, 1, 3, 4, 3, 9, 4, 2, 9, 4, 9, 9, 2, 9, 1, 3, 9, 4, 3, 4, 2]
    for depth in range(5):
        cfg, roles = page.Config(depth=depth), roles_of(ids)
        seen = page.build(cfg).dense(len(ids), roles=roles)[0, 0].tolist()
        at = []
        for i, row in enumerate(seen):
            at.append(1 + max((at[j] for j in range(i) if row[j]), default=-1))
        assert page.positions(roles, cfg).tolist() == at


def test_a_text_that_is_being_written_has_the_labels_of_the_finished_one():
    whole = roles_of(NESTED)
    for n in range(1, len(NESTED)):
        part = roles_of(NESTED[:n])
        for name in part:
            assert torch.equal(part[name], whole[name][:n])
        assert page.positions(part, page.Config()).tolist() == POSITIONS[:n]


def test_rows_of_a_batch_and_padding_anywhere():
    texts = [NESTED[:20], [9] * 20]
    batch = page.read_roles(torch.tensor(texts), PARALLEL, PATH)
    assert batch["path"].shape == (2, 20)
    index = torch.tensor([[-1, -1, *range(8), -1, *range(8, 20)], [*range(20), -1, -1, -1]])
    padded = batch.gather(index).with_(padding=(index < 0).long())
    at = page.positions(padded, page.Config())
    assert at[0][index[0] >= 0].tolist() == POSITIONS[:20] and at[1][index[1] >= 0].tolist() == list(
        range(20)
    )


def test_paths_of_a_later_block_see_those_of_an_earlier_one():
    ids = [9, 1, 3, 9, 4, 3, 4, 2, 9, 1, 3, 9, 4, 3, 4, 2]
    seen = page.build(page.Config()).dense(len(ids), roles=roles_of(ids))[0, 0]
    assert bool(seen[9:, :9].all()) and not bool(seen[5:7, 2:5].any())


def test_plain_text_is_causal():
    roles = Roles(parallel=[0] * 6, path=[-1] * 6)
    assert torch.equal(page.build(page.Config()).dense(6, roles=roles), causal().dense(6))


@pytest.mark.parametrize(
    ("ids", "rule"),
    [
        ([3, 4], r"a path opens in a block \(place=0, inside=None\)"),
        ([1, 3, 3], r"a path opens in a block \(place=2, inside='path'\)"),
        ([1, 3, 2], r"what was opened last closes first \(place=2, closes='block'\)"),
        ([9, 2], r"what was opened last closes first \(place=1, closes='block'\)"),
        ([1, 4], r"what was opened last closes first \(place=1, closes='path'\)"),
        ([1, 3] * 5, r"paths are nested 4 deep at most \(deep=5\)"),
    ],
)
def test_tags_that_do_not_fit_are_refused(ids, rule):
    with pytest.raises(ValueError, match=rule):
        roles_of(ids)
