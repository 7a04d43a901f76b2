"""HeadKV: where importance comes from, and what is refused."""

import json

import pytest
import torch

from regard import catalog
from regard.attaching.attachment import attach
from regard.testing.zoo import build, ids

ROWS = ((0.1, 0.5), (0.0, 0.3), (0.9, 0.2))
SMALL = {"budget": 8, "window": 3, "temperature": 2.0}


def held(importance) -> list:
    """What is held of every layer after a prompt."""
    model, _ = build("llama")
    with attach(model, catalog.method("headkv", **SMALL, importance=importance)), torch.no_grad():
        cache = model(ids(1, 20), use_cache=True).past_key_values
        return [
            (group.heads, group.n, group.table().tolist()) for layer in cache.layers for group in layer.groups
        ]


def rows_of(model) -> tuple:
    config = model.config
    return tuple(row[: config.num_key_value_heads] for row in ROWS)[: config.num_hidden_layers]


def test_a_file_says_what_the_setting_says(tmp_path):
    rows = rows_of(build("llama")[0])
    want = held(rows)
    assert len({n for _, n, _ in want}) > 1
    plain, detected = tmp_path / "rows.json", tmp_path / "detected.json"
    plain.write_text(json.dumps(rows))
    # each head's scores in several texts, as the released detection writes them
    scores = {f"{i}-{h}": [x - 0.05, x + 0.05] for i, row in enumerate(rows) for h, x in enumerate(row)}
    detected.write_text(json.dumps(dict(reversed(scores.items()))))
    assert held([list(row) for row in rows]) == want
    assert held(str(plain)) == want
    assert held(str(detected)) == want


def test_heads_are_measured_where_nothing_is_said():
    model, _ = build("llama")
    with attach(model, catalog.method("snapkv+headkv", **SMALL)) as attached:
        (policy,) = (a for a in attached.actors if a.needs_cache)
        measured = policy.method.config.headkv.importance
    config = model.config
    assert [len(row) for row in measured] == [config.num_key_value_heads] * config.num_hidden_layers
    assert len({x for row in measured for x in row}) > 1


@pytest.mark.parametrize(
    ("importance", "says"),
    [
        ("no such file.json", "a JSON file"),
        (((0.1, 0.2), (0.3,)), "a row for each layer"),
        ((), "a row for each layer"),
        (((0.1, -0.2),), "not below 0"),
    ],
)
def test_what_is_no_importance_is_refused(importance, says):
    with pytest.raises(ValueError, match=says):
        catalog.method("headkv", importance=importance)


def test_scores_of_another_model_are_refused():
    with pytest.raises(ValueError, match="of this model's heads"):
        held(((0.1, 0.2),))
