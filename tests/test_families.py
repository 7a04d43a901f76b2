"""Every decoder of transformers: a sample is what docs/families.md says, and what the survey found stays mended."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers.masking_utils import causal_mask_function, eager_mask
from typer.testing import CliRunner

from regard import attach
from regard.attaching.lazy_mask import Standins, lazy_mask
from regard.attaching.sites import ATTENTION
from regard.attaching.slots import Group
from regard.cli import app
from regard.core import Unsupported
from regard.testing.families import VERDICTS, FamilyRow, build, names, survey
from regard.testing.families import table as tables
from regard.testing.families.run import Worker
from regard.testing.families.settings import GENERIC, LOUDER, OVERRIDES, UNBUILT
from regard.testing.families.trials import METHODS, Outcome, Subject, Wrong, policy, tried

PAGE = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf8")
# one of each kind: norms and layers without positions, no rotation, eager alone, latents, chosen keys, a learned bias,
# expanded keys, sliding layers, states beside keys, shared keys, states alone, attention in its own code
SAMPLE = (
    "afmoe", "bert", "bigbird_pegasus", "deepseek_v4", "gemma3n_text", "glm", "glm_moe_dsa", "inkling2_text",
    "inkling_text", "jetmoe", "longcat_flash", "mamba", "mistral", "mpt", "nemotron_h",
)  # fmt: skip


def rows_of_page() -> dict[str, list[str]]:
    """Family -> the cells of its row."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_a_sample_is_what_the_page_says():
    page = rows_of_page()
    for row in survey(SAMPLE):
        model, verdict, sites, _, *methods, _ = page[row.name]
        said = [tables.cell(row, method.name) for method in METHODS]
        assert (row.model, row.verdict, str(row.reached), said) == (model, verdict, sites, methods), row.why


def test_the_page_counts_its_rows():
    rows = [FamilyRow(name, verdict=cells[1]) for name, cells in rows_of_page().items()]
    assert tables.sentence(rows) in PAGE
    assert {row.verdict for row in rows} <= set(VERDICTS)


def test_nothing_is_wrong_or_crashed():
    bad = {name: cells[1] for name, cells in rows_of_page().items() if cells[1] in ("wrong", "crashed")}
    assert not bad


def test_the_page_has_every_decoder():
    if f"transformers {transformers.__version__}," in PAGE:
        assert sorted(rows_of_page()) == names()


def test_what_does_not_go_has_a_reason():
    for name, cells in rows_of_page().items():
        assert (cells[1] == "right") == (cells[-1] == ""), name


def test_settings_are_in_order_and_of_families():
    for settings in (OVERRIDES, UNBUILT, LOUDER):
        assert list(settings) == sorted(settings)
        assert set(settings) <= set(names())
    for name, own in OVERRIDES.items():
        assert not [field for field in own if own[field] == GENERIC.get(field, ...)], name


# -- a survey goes on


def test_a_family_that_takes_too_long_is_a_row():
    slow, after = survey(["llama", "falcon"], limit=0.001), []
    for row in slow:
        after.append((row.name, row.verdict, row.why))
    assert after == [(n, "crashed", "no answer in 0.001 seconds") for n in ("llama", "falcon")]


def test_a_process_that_dies_is_a_row():
    worker = Worker()
    worker.process.kill()
    row = worker.ask("llama", 60)
    assert (row.verdict, row.why) == ("crashed", "its process ended by signal 9")


def test_a_wrong_family_is_found():
    """A method whose keys are lost by a shift in the ledger does not pass for right."""
    subject = Subject.of(build("llama"))
    method = METHODS[2]
    assert tried(lambda: policy(subject, method)).state == "right"
    subject.script = [out + 1e-3 for out in subject.script]
    outcome = tried(lambda: policy(subject, method))
    assert outcome.state == "wrong" and "room for all" in outcome.said


def test_outcomes_of_what_a_trial_raises():
    def trial(error: Exception):
        def run() -> Outcome:
            raise error

        return tried(run)

    assert trial(Wrong("w", 2.0)) == Outcome("wrong", "w", 2.0)
    assert trial(Unsupported("u")).state == "refused"
    assert trial(IndexError("i")) == Outcome("crashed", "IndexError: i")


def test_on_the_command_line():
    run = CliRunner()
    result = run.invoke(app, ["doctor", "--families", "--only", "llama,falcon"])
    assert result.exit_code == 0, result.output
    assert "2 decoders, 2 built: 1 right, 1 refused" in result.output
    assert max(map(len, result.output.splitlines())) <= 100
    assert run.invoke(app, ["doctor"]).exit_code == 2
    with pytest.raises(KeyError, match=r"no causal decoder is called 'lama'; near names: .*llama"):
        run.invoke(app, ["doctor", "--families", "--only", "lama"], catch_exceptions=False)


# -- what the survey found


def ids() -> torch.Tensor:
    return torch.randint(3, 118, (1, 12), generator=torch.Generator().manual_seed(0))


def test_a_module_that_does_not_say_it_is_causal():
    """Where no mask is needed, causality is the mask rule's to say: BigBird-Pegasus' modules say they have none."""
    model = build("bigbird_pegasus")
    with torch.no_grad():
        plain = model(ids(), use_cache=False).logits
        with attach(model):
            assert torch.allclose(model(ids(), use_cache=False).logits, plain, atol=1e-6)


@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_a_stand_in_is_what_the_model_would_have(own):
    """In lists too, and of the dtype that the model's own mask has: DeepSeek-V4 and Git compute on theirs."""
    config, standins = transformers.LlamaConfig(), Standins()
    standins.own[id(config)] = own
    sizes = dict(batch_size=2, q_length=3, kv_length=3, mask_function=causal_mask_function)
    mask = standins.mask(**sizes, config=config, dtype=torch.float32)
    wanted = eager_mask(**sizes) if own == "eager" else eager_mask(**sizes) == 0
    assert mask.dtype == wanted.dtype
    assert torch.equal(torch.cat([mask, mask], -1), torch.cat([wanted, wanted], -1))
    assert torch.equal(torch.stack(tensors=(mask,)), wanted[None])
    assert torch.equal(mask.to(torch.bool), wanted.to(torch.bool))


def test_an_option_that_is_not_known_is_refused():
    model = build("inkling2_text")
    with pytest.raises(Unsupported, match=r"Inkling2.*hands sinks float32"), attach(model), torch.no_grad():
        model(ids())


def test_keys_that_a_model_chooses():
    """A query sees the chosen keys of those that it saw; what is past the end of a row's own is hidden as ever."""
    rule = lazy_mask(1, 3, 5, q_offset=2, mask_function=causal_mask_function).rule
    chosen = torch.tensor([[[0, 4], [3, 1], [2, 4]]])
    wanted = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 1]], dtype=torch.bool)
    some = rule.among(chosen)
    assert torch.equal(some.native()[0, 0], wanted) and torch.equal(some.dense()[0, 0], wanted)
    assert torch.equal(some.at(slice(None), torch.arange(5)[None, None])[0, 0], wanted)
    assert not some.causal


@pytest.mark.parametrize("viewed", [True, False])
def test_what_leaves_a_window_is_not_written_over_while_it_is_read(viewed):
    """SnapKV's votes on a sliding layer are of the slots as they were; one that left had its share."""
    keys = torch.arange(4.0).view(1, 1, 4, 1)
    index = torch.tensor([[[5, 7, 8, 9]]], dtype=torch.int32)
    group = Group((0,), keys.clone(), keys.clone(), 4, index.clone())
    k, table = group.k(), group.table()
    assert group.forget(6, viewed)
    assert sorted(group.table().flatten().tolist()) == [7, 8, 9]
    untouched = torch.equal(k, keys) and torch.equal(table, index)
    assert untouched == viewed


def test_latent_attention_by_its_name_is_a_site():
    assert ATTENTION.search("LongcatFlashMLA") and not ATTENTION.search("LongcatFlashMLP")
