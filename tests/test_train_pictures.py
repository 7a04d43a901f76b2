"""Training tasks of images: what is shown, what is right, what is judged, and runs that go on."""

import json

import pytest
import torch
from tests.golden import unpacked
from typer.testing import CliRunner

from regard.cli import app
from regard.nn import VisionBackbone
from regard.train import Plan, train
from regard.train.digits import SIZES, digits, shifted
from regard.train.pictures import CANVAS, PATCH, Digits, Find, scenes
from regard.train.suits import IMAGES, TEXTS

SMALL = dict(steps=8, every=4, rates=(1e-3, 1e-2), batch=8, layers=1, width=16, heads=2, mlp=16, tested=16)


def test_the_parts_of_the_digits_share_no_image():
    parts = digits()
    assert {name: len(part.labels) for name, part in parts.items()} == SIZES
    rows = {name: {tuple(row) for row in part.images.flatten(1).tolist()} for name, part in parts.items()}
    assert sum(len(r) for r in rows.values()) == len(set.union(*rows.values())) == 1797


def test_an_image_is_moved_and_zeros_come_in():
    image = torch.arange(1.0, 10).view(1, 1, 3, 3).repeat(2, 1, 1, 1)
    out = shifted(image, torch.tensor([[1, 0], [-1, 1]]))
    assert out[0, 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert out[1, 0].tolist() == [[0, 4, 5], [0, 7, 8], [0, 0, 0]]


def test_the_place_is_that_of_the_digit_and_not_of_a_decoy():
    """The digit is the one drawing that is an image of the data, wherever it lies."""
    images, labels = scenes("test", 12, torch.Generator().manual_seed(5))
    known = digits()["test"].images[:, 0]
    assert images.shape == (12, 1, CANVAS, CANVAS) and len({*labels.tolist()}) > 6
    for image, label in zip(images[:, 0], labels, strict=True):
        y, x = (int(at) * PATCH for at in divmod(int(label), CANVAS // PATCH))
        # its middle, the corner of four pixels, lies in the patch: its first pixel 4 before it
        corners = [(a - 4, b - 4) for a in range(y, y + PATCH) for b in range(x, x + PATCH)]
        apart = [
            (image[a : a + 8, b : b + 8] - known - 0.05).abs().amax((1, 2)).min().item()
            for a, b in corners if 0 <= a <= CANVAS - 8 and 0 <= b <= CANVAS - 8
        ]  # fmt: skip
        cut = y in (0, CANVAS - PATCH) or x in (0, CANVAS - PATCH)
        assert cut or min(apart) <= 0.0501, label


def test_confusions_by_hand():
    found = Digits.confusion(Plan(task="digits"), torch.tensor([1, 1, 7]), torch.tensor([1, 2, 2]))
    assert found["counts"][1][1] == found["counts"][2][1] == found["counts"][2][7] == 1
    assert sum(map(sum, found["counts"])) == 3
    side = CANVAS // PATCH
    # one patch too far down and two too far left; right
    found = Find.confusion(
        Plan(task="find"), torch.tensor([3 * side + 2, 5]), torch.tensor([2 * side + 4, 5])
    )
    at = found["rows"].index("1"), found["columns"].index("-2")
    assert found["counts"][at[0]][at[1]] == 1
    assert found["counts"][found["rows"].index("0")][found["columns"].index("0")] == 1
    assert [len(row) for row in found["counts"]] == [len(found["columns"])] * len(found["rows"])


class Stop(Exception):
    pass


@pytest.mark.parametrize("task", ["digits", "find"])
def test_a_run_goes_on_as_if_it_had_not_been_stopped(task, tmp_path):
    plan = Plan(task=task, mechanisms=("softmax", "fused_neighborhood_attention"), **{**SMALL, "layers": 2})
    whole = train(plan, tmp_path / "whole")
    heard = []

    def hear(point):
        heard.append(point)
        if len(heard) in (5, 12):
            raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            train(plan, tmp_path / "cut", hear)
    cut = train(plan, tmp_path / "cut")
    assert {k: v for k, v in cut.items() if k not in ("facts", "model")} == {
        k: v for k, v in whole.items() if k not in ("facts", "model")
    }
    models = [VisionBackbone.from_pretrained(tmp_path / f / "best").state_dict() for f in ("whole", "cut")]
    assert all(torch.equal(t, models[1][name]) for name, t in models[0].items())
    assert [layer[0].attention.method.name for layer in VisionBackbone.from_pretrained(cut["model"]).stages] == [
        "softmax", "fused_neighborhood_attention"]  # fmt: skip


def test_what_is_judged_is_what_the_best_model_answers_on_the_test_part(tmp_path):
    result = train(Plan(task="digits", **SMALL), tmp_path)
    model = VisionBackbone.from_pretrained(tmp_path / "best").eval()
    images, labels = digits()["test"]
    right = (model(images).logits.argmax(-1) == labels).double().mean().item()
    assert result["judged"] == right and result["judged on"] == 497
    counts = torch.tensor(result["confusion"]["counts"])
    assert (
        counts.diagonal().sum() == round(497 * right) and counts.sum(1).tolist() == labels.bincount().tolist()
    )
    page = (tmp_path / "report.html").read_text()
    assert "497 images that nothing was chosen on" in page and "images per second" in page
    assert result["facts"]["images"] == 64
    assert "nats per image" in str(unpacked(page, "figures")) and "rope_theta" not in page


def test_settings_suit_the_task_and_those_of_texts_are_refused(tmp_path):
    assert Plan.of("digits").steps == IMAGES["steps"] and Plan.of("mqar") == Plan()
    assert Plan.of("digits", steps=3).steps == 3 and Plan().steps == TEXTS["steps"]
    two = Plan.of("digits", mechanisms=("softmax", "gla"), layers=4, width=16, heads=2).model()
    assert two.config.depths == [2, 2] and two.config.hidden_sizes == [16, 32]
    with pytest.raises(ValueError, match="every stage has as many layers"):
        Plan.of("digits", mechanisms=("softmax",) * 3).model()
    asked = ["train", "--task", "digits", "--length", "32", "--out", str(tmp_path / "x")]
    out = CliRunner().invoke(app, asked)
    assert out.exit_code != 0 and not (tmp_path / "x").exists()
    small = "--steps 2 --every 2 --rates 1e-3 --layers 1 --width 16 --heads 2 --mlp 16 --batch 4 --json"
    out = CliRunner().invoke(app, ["train", "--task", "digits", *small.split(), "--out", str(tmp_path / "y")])
    assert out.exit_code == 0, out.output
    assert json.loads(out.stdout)["task"] == "digits"
