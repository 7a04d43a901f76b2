"""Modality-mutual attention: the released code's block on one image and one turn, a slow loop on several."""

import pytest
import torch

import regard
from regard.core import Unsupported
from regard.core.mask import causal
from regard.core.roles import Roles
from regard.methods.masks import aki_mma


def released(n, image, text, answer):
    """Rows of the image, columns from its end to the answer, over a lower triangle."""
    mask = torch.ones(n, n).tril()
    mask[image:text, text:answer] = 1
    return mask.bool()


def seen(roles):
    return aki_mma.build(aki_mma.Config()).dense(roles.length, roles=roles)


def test_one_image_and_one_turn_are_the_released_block():
    # two words of the system, four patches, three words of the question, two of the answer
    roles = Roles(
        image=[0] * 2 + [1] * 4 + [0] * 5,
        question=[-1] * 2 + [1] * 4 + [1] * 3 + [-1] * 2,
    )
    assert torch.equal(seen(roles)[0, 0], released(11, 2, 6, 9))
    # without an answer's tag the released code unlocks nothing, and without an image there is nothing to unlock
    assert torch.equal(seen(roles.with_(question=[-1] * 11))[0, 0], causal().dense(11)[0, 0])
    assert torch.equal(seen(roles.with_(image=[0] * 11))[0, 0], causal().dense(11)[0, 0])


# turn 1: image 1, a word, image 2, two words, an answer; turn 2: a word, image 3, a word, an answer
IMAGE = [1, 1, 0, 2, 2, 0, 0, 0, 0, 3, 3, 0, 0]
QUESTION = [1, 1, 1, 1, 1, 1, 1, -1, 2, 2, 2, 2, -1]


def test_several_images_and_turns_by_a_slow_loop():
    image, question = [IMAGE, [0, *IMAGE[:-1]]], [QUESTION, [-1, *QUESTION[:-1]]]
    dense = seen(Roles(image=image, question=question))
    n = len(IMAGE)
    for row in range(2):
        for i in range(n):
            for j in range(n):
                ahead = image[row][i] > 0 and image[row][j] == 0 and question[row][i] == question[row][j]
                assert bool(dense[row, 0, i, j]) == (j <= i or ahead), (row, i, j)


def test_no_word_and_no_answer_is_ever_seen_from_before_by_words():
    dense = seen(Roles(image=IMAGE, question=QUESTION))[0, 0]
    ahead = dense & ~causal().dense(len(IMAGE))[0, 0]
    words, answers = torch.tensor(IMAGE) == 0, torch.tensor(QUESTION) < 0
    assert not ahead[words].any(), "rows of words are causal"
    assert not ahead[:, answers].any(), "columns of answers stay locked"
    assert not ahead[:, ~words].any(), "images stay causal among each other"
    assert not ahead[:5, 8:].any(), "a later turn is not seen"


def test_attend_refuses_to_hide_it_and_the_answer_of_one_row_is_causal():
    roles = Roles(image=IMAGE, question=QUESTION)
    q, k, v = torch.randn(3, 1, 2, len(IMAGE), 8, generator=torch.Generator().manual_seed(0)).unbind()
    with pytest.raises(Unsupported, match="later ones"):
        regard.attend(q, k, v, "softmax", mask="aki_mma", roles=roles)
    out = regard.attend(q, k, v, "softmax", "self", mask="aki_mma", roles=roles).out
    plain = regard.attend(q, k, v, "softmax").out
    words = torch.tensor(IMAGE) == 0
    torch.testing.assert_close(out[:, :, words], plain[:, :, words])
    assert float((out - plain)[:, :, ~words].abs().amax(-1).min()) > 1e-3
