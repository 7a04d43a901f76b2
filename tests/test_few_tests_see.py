"""What a sample of planted faults showed that no quick test asks."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from regard.attaching.actors import AttentionCall
from regard.attaching.views import make_view
from regard.core.mask import causal, window
from regard.ops.labels import report_reading
from regard.report.pieces import plot
from regard.tasks.zoology_mqar import check_sizes

SRC = Path(__file__).parents[1] / "src/regard"


def defaults(node):
    """(name, default) of what a function may be called without."""
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    yield from zip(plain[len(plain) - len(args.defaults) :], args.defaults, strict=True)
    yield from zip(args.kwonlyargs, args.kw_defaults, strict=True)


def test_nobody_trusts_the_code_of_a_model_unasked():
    found = []
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found += [
                    (path.name, node.name, ast.literal_eval(value))
                    for arg, value in defaults(node)
                    if arg.arg == "trust_remote_code" and value is not None
                ]
    assert len(found) > 8 and all(value is False for *_, value in found), found


def test_a_model_that_hands_no_scale_is_viewed_with_the_root_of_its_heads():
    q, k = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    scale = {
        given: make_view(AttentionCall(None, None, q, k, k, None, {"scaling": given}, None)).scale
        for given in (None, 0.7)
    }
    assert scale == {None: 0.25, 0.7: 0.7}


@pytest.mark.parametrize("mask", [~causal(), ~(causal() & window(3)), ~causal() | window(2)], ids=repr)
def test_tiles_of_what_is_not_seen(mask):
    n, block = 12, 3
    tiles = mask.dense(n)[0, 0].unflatten(0, (-1, block)).unflatten(2, (-1, block)).transpose(1, 2).flatten(2)
    wanted = tiles.any(-1).int() + tiles.all(-1).int()
    assert {*wanted.flatten().tolist()} >= {1, 2}
    assert torch.equal(mask.blocks(n, block=block).kind[0, 0].int(), wanted)


def test_bytes_of_what_is_read_beside_its_labels():
    """Two texts, four query heads over two of keys, three slots each: keys of 8 and values of 4 numbers."""
    told = []
    k, v = torch.zeros(2, 2, 9, 8, dtype=torch.bfloat16), torch.zeros(2, 2, 9, 4)
    beside = torch.zeros(5, dtype=torch.float16)
    report_reading(SimpleNamespace(k=k, v=v, report_bytes=told.append), torch.zeros(2, 4, 3), beside)
    assert told == [5 * 2 + 2 * 4 * 3 * (8 * 2 + 4 * 4)]


def test_a_plot_has_its_caption_and_none_where_there_is_none():
    figure = SimpleNamespace()
    assert "<figcaption>by head</figcaption>" in plot("at", figure, "what", "by head")
    assert "figcaption" not in plot("at", figure, "what")


def test_an_odd_length_is_no_length_of_zoology_mqar():
    check_sizes(vocab=64, length=64, pairs=4, power=0.01)
    with pytest.raises(ValueError, match=r"length is even \(length=63\)"):
        check_sizes(vocab=64, length=63, pairs=4, power=0.01)
