"""turns: how many facts a prompt holds."""

import pytest

from regard import catalog
from regard.testing.tokenizers import WordTokenizer, samples


@pytest.mark.parametrize(
    ("length", "settings", "facts"),
    [
        (256, {"questions": 2, "tokens_per_fact": 400}, 4),
        (256, {"questions": 5, "tokens_per_fact": 400}, 5),
        (400, {"questions": 2, "tokens_per_fact": 50}, 8),
        (400, {"questions": 2, "tokens_per_fact": 50, "most_facts": 6}, 6),
    ],
)
def test_a_prompt_holds_at_least_four_facts_and_one_for_each_question(length, settings, facts):
    drawn = samples(catalog.method("turns", **settings), length, 2, 0, WordTokenizer())
    assert [sample.chance for sample in drawn] == [1 / facts] * 2
