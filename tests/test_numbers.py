"""The numbers of a cell by hand, from logits, times and bytes that are made up: exact, and the right way round."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from regard import catalog
from regard.bench import measuring as cells
from regard.bench import passes, timing
from regard.bench.cell import FULL, Cell
from regard.bench.harness import Meter
from regard.bench.measuring import Bench, batches, measure, peak_memory
from regard.bench.passes import Pass, own_bytes, run
from regard.bench.quality import by_place, exact_turns, fidelity, foretold, generated, quality, shown
from regard.bench.timed import paired_times, running_text
from regard.ops.budget import parse_budget
from regard.ops.labels import report_reading
from regard.tasks import Sample, Turn
from regard.testing.task import WordTokenizer
from regard.testing.zoo import build, ids

FAIR, SURE = (0.5, 0.5), (0.8, 0.2)  # next-token probabilities over two tokens
FORWARD = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(
    0.5 / 0.2
)  # KL(FAIR || SURE), 0.223; the other way 0.193


class Letters:
    eos_token_id = 3

    def decode(self, ids):
        return "".join("abcdefgh"[int(i)] for i in ids)


def foretelling(rows, **numbers) -> Pass:
    """A pass whose next-token probabilities are these, [samples][steps][tokens]."""
    facts = dict(prefill=0.0, steps=[0.0], held=0, kept=0, read=0.0) | numbers
    return Pass(torch.as_tensor(rows, dtype=torch.float64).log(), **facts)


def ones(ids, size: int = 4, **numbers) -> Pass:
    """A pass that is sure of these ids, [samples][steps]."""
    return foretelling(torch.nn.functional.one_hot(torch.as_tensor(ids), size).double() + 1e-9, **numbers)


def asking(answer, **rest) -> Sample:
    return Sample([0, 0, 0], list(answer), (0, 0), **rest)


# Quality


def test_perplexity_is_full_attentions_over_the_methods():
    """Full attention gives each token 1/2, the method 4/5 or 1/5: two texts, one of which it foretells better."""
    samples = [asking([0, 0]), asking([1, 1])]
    full, ours = [foretelling([[FAIR] * 2] * 2)], [foretelling([[SURE] * 2] * 2)]
    row = quality("nll", samples, ours, full, Letters())
    assert [s["score"] for s in row["samples"]] == pytest.approx([0.8 / 0.5, 0.2 / 0.5])
    assert row["quality"] == pytest.approx(math.sqrt(1.6 * 0.4))  # the mean is of logarithms
    assert (row["quality_low"], row["quality_high"]) == pytest.approx((0.4, 1.6))
    assert row["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.2)) / 2)
    assert row["chance"] == pytest.approx(1.0)  # a perplexity of 2 in a vocabulary of 2
    assert quality("nll", samples, full, full, Letters())["quality"] == 1


def test_what_a_text_is_guessed_at_is_perplexity_over_vocabulary():
    assert foretold(torch.tensor([[math.log(2), math.log(8)]]), 16) == pytest.approx(4 / 16)
    assert foretold(torch.tensor([[9.0]]), 16) == 1


def test_parts_of_a_text_begin_where_they_begin():
    nll = torch.arange(20.0).view(2, 10)  # ten tokens in eight parts: two of two tokens, six of one
    starts, values = zip(*by_place(nll), strict=True)
    assert starts == (0, 2, 4, 5, 6, 7, 8, 9)
    assert values == (5.5, 7.5, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0)


def test_an_answer_is_right_where_all_its_tokens_are():
    sample = asking([0, 1, 2], turns=(Turn([0], [1]), Turn([0], [2, 3])))
    right = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]], dtype=torch.bool)
    assert exact_turns(right, sample).tolist() == [[1, 0, 1], [0, 1, 0], [1, 1, 0]]


def test_what_is_generated_ends_at_the_end_of_the_text():
    assert generated([1, 2, 3, 1], Letters()) == "bc" and generated([1, 2], Letters()) == "bc"
    wanted = asking([0] * 4, wanted=("bc", "eb"))
    row = quality("recall", [wanted] * 2, [ones([[1, 2, 3, 0], [4, 1, 1, 2]], 5)], [], Letters())
    assert [s["score"] for s in row["samples"]] == [0.5, 1.0] and row["quality"] == 0.75
    assert [s["generated"] for s in row["samples"]] == ["bc", "ebbc"]
    assert row["samples"][0]["answer"] == "bc, eb"


def test_samples_are_shown_with_their_own_numbers():
    several = Sample([0] * 9, [2], (0, 3), 0.75, facts=((0, 1), (2, 3)))
    one = Sample([0] * 9, [1], (2, 4), 0.25, chance=0.5)
    rows = shown([one, several], np.array([0.2, 0.4]), ["b", "d"], Letters(), "exact")["samples"]
    assert rows == [
        {"depth": 0.25, "score": 0.2, "answer": "b", "generated": "b"},
        {"depth": None, "score": 0.4, "answer": "c", "generated": "d"},
    ]
    assert (
        quality("exact", [one, several], [ones([[1], [1]])], [ones([[1], [2]])], Letters())["chance"] == 0.25
    )


# Intervals


def test_intervals_hold_95_per_cent_of_the_draws():
    """Of 100 samples of which half are right, the share that is drawn lies between 40 and 60 % in 95 % of draws.

    90 % would lie between 42 and 58 %, 99 % between 37 and 63 %. A thousand draws place an end to within 1 %.
    """
    said = [[i % 2] for i in range(100)]
    samples, full = [asking([1])] * 100, [ones([[1]] * 100)]
    row = quality("exact", samples, [ones(said)], full, Letters())
    assert row["quality"] == 0.5
    assert (row["quality_low"], row["quality_high"]) == pytest.approx((0.4, 0.6), abs=0.011)
    row = fidelity([asking([1])] * 100, [foretelling([[SURE if i % 2 else FAIR] for i in range(100)])],
                   [foretelling([[FAIR]] * 100)])  # fmt: skip
    assert row["kl"] == pytest.approx(0.5 * FORWARD)
    ends = row["kl_low"] / FORWARD, row["kl_high"] / FORWARD
    assert ends == pytest.approx((0.4, 0.6), abs=0.011)


def test_ends_of_few_samples_are_those_of_their_draws():
    """Of four draws among three right and one wrong 5.1 % have two wrong or more, 0.4 % all: the 2.5th is one of 4."""
    answer, full = [asking([1])] * 4, [ones([[1]] * 4)]
    for said, ends in (([1, 1, 1, 0], (0.25, 1.0)), ([0, 0, 0, 1], (0.0, 0.75))):
        row = quality("exact", answer, [ones([[i] for i in said])], full, Letters())
        assert (row["quality_low"], row["quality_high"]) == ends


# Fidelity


def test_divergence_is_full_attentions_from_the_method():
    row = fidelity([asking([0, 1])], [foretelling([[SURE, FAIR]])], [foretelling([[FAIR, FAIR]])])
    assert row["kl"] == pytest.approx(FORWARD / 2)  # the mean over steps


def test_agreement_is_the_share_of_steps_of_all_samples():
    full = ones([[1, 2, 3, 1], [1, 1, 1, 1]])
    ours = ones([[1, 2, 0, 1], [0, 0, 1, 1]])
    assert fidelity([asking([0] * 4)] * 2, [ours], [full])["agreement"] == 5 / 8
    # fed what it says, a sample counts up to its first departure: three steps, and one
    assert fidelity([asking([0] * 4, wanted=("a",))] * 2, [ours], [full])["agreement"] == 2 / 4


def test_steps_beyond_an_answer_are_not_counted():
    full, ours = ones([[1, 2, 3], [1, 2, 3]]), ones([[1, 0, 0], [1, 2, 0]])
    samples = [asking([1, 3, 3], counted=1), asking([1, 2, 2], counted=2)]
    assert fidelity(samples, [ours], [full])["agreement"] == 1
    assert quality("exact", samples, [ours], [full], Letters())["quality"] == 1
    assert fidelity([asking([1, 2, 2])] * 2, [ours], [full])["agreement"] == 3 / 6


def test_an_answer_is_found_by_a_regex_or_as_the_likeliest_choice():
    free, choice = asking([0] * 3, pattern=".e$"), asking([2, 2, 2], counted=1, choices=(1, 2), chance=0.5)
    said = ones([[2, 0, 4], [0, 1, 1]], 6)
    said.logits[1, 0] = torch.tensor([0.5, 0.1, 0.3, 0.1, 0.0, 0.0])
    row = quality("exact", [free, choice], [said], [said], Letters())
    assert [s["score"] for s in row["samples"]] == [1, 1] and row["chance"] == 0.25
    assert [s["answer"] for s in row["samples"]] == [".e$", "c"]
    assert [s["generated"] for s in row["samples"]] == ["cae", "c"]  # of a choice, what was preferred
    said.logits[1, 0, 1] = 0.4
    row = quality("exact", [free, choice], [said], [said], Letters())
    assert [s["score"] for s in row["samples"]] == [1, 0]


# A cell


class Made(Bench):
    """Full attention is right; the method says something else of the last sample, and holds and reads less."""

    def method_of(self, cell):
        return None if cell.method == FULL else "method"

    def run(self, batch, method, weigh=False):
        n, ours, answers = len(batch), method is not None, torch.tensor([s.answer for s in batch])
        if n == 1 and ours:
            answers = answers - 1
        held, kept, read = (70 * n, 60 * n, 50.0 * n) if ours else (1000 * n, 900 * n, 800.0 * n)
        return ones(answers, 64, held=held, kept=kept, read=read)


@pytest.fixture
def made():
    return Made(SimpleNamespace(device=torch.device("cpu")), WordTokenizer())


def test_a_cell_sums_its_batches_the_short_last_one_too(made):
    cell = Cell("h2o", "needle", 100, 0.25, samples=5, batch_tokens=250)
    sizes = [len(b) for b in batches(list(range(5)), cell)]
    assert sizes == [2, 2, 1] and batches([], cell) == []
    assert [len(b) for b in batches([1, 2], Cell("h2o", "needle", 100, batch_tokens=50))] == [1, 1]
    row = measure(cell, made)
    assert row["status"] == "ok" and row["metric"] == "exact" and row["budget"] == 0.25
    assert [s["score"] for s in row["samples"]] == [1, 1, 1, 1, 0] and row["quality"] == 0.8
    assert row["agreement"] == pytest.approx(0.8)  # all tokens of one answer in five
    keys = ("bytes_held", "bytes_kept", "bytes_full", "bytes_read", "bytes_read_full")
    assert [row[key] for key in keys] == [350, 300, 5000, 250, 4000]
    samples, full = made.shared(cell)
    assert [len(p.logits) for p in full] == [2, 2, 1] and len(samples) == 5


def test_times_are_the_methods_over_full_attentions():
    taken = iter(
        [(8.0, [4.0, 1.0, 2.0]), (2.0, [0.5, 9.0, 1.0]), (4.0, [8.0, 4.0, 1.0]), (4.0, [2.0, 3.0, 0.5])]
    )
    asked = []

    def made(samples, method):
        asked.append((samples, method))
        prefill, steps = next(taken)
        return ones([[1]], prefill=prefill, steps=steps)

    facts = paired_times(["one"], "method", SimpleNamespace(run=made))
    assert asked == [(["one"], None), (["one"], "method")] * 2  # in turns
    # steps of full attention 2 and 4 in the middle, of the method 1 and 2; prefills 8 and 4, 2 and 4
    assert facts["decode_ratio"] == pytest.approx(0.5) and facts["decode_spread"] == 0
    assert facts["decode_ms"] == 1500
    assert facts["prefill_ratio"] == pytest.approx(math.sqrt(0.25 * 1))
    assert facts["prefill_spread"] == pytest.approx((1 - 0.25) / 2) and facts["prefill_ms"] == 3000


# One pass


class Clock:
    seconds = 0.0

    def __call__(self, device=None) -> float:
        return self.seconds


class Walking:
    """A model that takes a second for each token and one more for each call, and keeps 24 bytes of each token."""

    device = torch.device("cpu")

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        self.clock.seconds += 1 + ids.shape[1]
        cache = past_key_values or SimpleNamespace(layers=[SimpleNamespace(keys=torch.zeros(1, 1, 0, 4))])
        layer = cache.layers[0]
        tokens = layer.keys.shape[2] + ids.shape[1]
        layer.keys, layer.values = torch.zeros(1, 1, tokens, 4), torch.zeros(1, 1, tokens, 2)
        return SimpleNamespace(past_key_values=cache, logits=torch.full((len(ids), 1, 3), float(tokens)))


def test_a_pass_is_timed_and_weighed_step_by_step(monkeypatch):
    """A context of 4 tokens, 2 that are written, a question of 3 and its answer of 2, then a turn of 2 and 1."""
    clock = Clock()
    monkeypatch.setattr(passes, "now", clock)
    sample = Sample(list(range(9)), [1, 2], (0, 0), context=4, written=2, turns=(Turn([3, 4], [5]),))
    found = run(Walking(clock), [sample], None)
    assert found.prefill == 5.0  # of the context alone
    assert (
        found.steps == [2.0] * 5
    )  # of the written, the answers; what of a question is read at once is no step
    ends = [5, 6, 9, 10, 13]  # tokens in the cache after each step
    assert found.held == found.kept == 24 * 13 and found.read == 24 * sum(ends) / 5
    assert found.logits[0, :, 0].tolist() == [9.0, 10.0, 13.0]
    prompt = Sample(list(range(9)), [1, 2], (0, 0))
    assert run(Walking(clock), [prompt], None).prefill == 9.0  # all but the last token


def test_units_of_bytes():
    sizes = {"3B": 3, "3KB": 3_000, "3MB": 3_000_000, "3GB": 3_000_000_000}
    sizes |= {"3KiB": 3_072, "3MiB": 3_145_728, "3GiB": 3_221_225_472, "1.5 kb": 1_500}
    assert {text: parse_budget(text).bytes for text in sizes} == sizes


def test_what_is_read_is_the_mean_over_decode_steps():
    meter = Meter(SimpleNamespace(bytes_read=lambda: 10, bytes_held=lambda: 7, bytes_stored=lambda: 9))
    assert meter.facts() == {"bytes_held": 0, "bytes_kept": 0, "bytes_read": None}
    for _ in range(2):
        for width in (5, 1, 1):
            meter.after_forward(
                None, (), {"input_ids": torch.zeros(1, width)}, SimpleNamespace(past_key_values=1)
            )
        meter.close()
    assert meter.facts() == {"bytes_held": 14, "bytes_kept": 18, "bytes_read": 10}


def test_bytes_are_those_of_the_numbers_kept():
    layers = [
        SimpleNamespace(keys=torch.zeros(2, 3, dtype=torch.bfloat16), values=torch.zeros(5)),
        SimpleNamespace(keys=None, values=torch.zeros(7, dtype=torch.int8)),
        SimpleNamespace(),
    ]
    assert own_bytes(SimpleNamespace(layers=layers)) == 2 * 6 + 4 * 5 + 7


@pytest.mark.parametrize(
    ("budget", "kept", "reads"), [(8, 8, [9, 9, 9, 9]), (1.0, 27, [24, 25, 26, 27]), (0.25, 7, [7, 7, 8, 8])]
)
def test_an_evicting_methods_bytes_are_those_of_its_budget(budget, kept, reads):
    """23 tokens are prefilled and four steps follow, each of which reads what was kept and the new token.

    A quarter of 23, 24, ... 27 tokens, rounded up, is 6, 6, 7, 7, 7.
    """
    model = build("llama")[0]
    batch = [Sample(ids(1, 24)[0].tolist(), [1, 2, 3, 4], (0, 0))] * 2
    found = run(model, batch, catalog.method("streaming_llm", budget=budget))
    config = model.config
    heads = config.num_hidden_layers * config.num_key_value_heads
    token = len(batch) * 2 * 4 * heads * config.head_dim  # keys and values of float32
    assert found.kept == kept * token and found.read == sum(reads) / 4 * token


# Memory


def test_peak_memory_is_in_bytes(tmp_path, monkeypatch):
    """Linux tells kibibytes, under the name of the high-water mark and not of what is held now."""
    (tmp_path / "status").write_text("VmPeak:\t  90 kB\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    (tmp_path / "clear_refs").write_text("")
    monkeypatch.setattr(cells, "Path", lambda name: tmp_path / name.rpartition("/")[2])
    with peak_memory(torch.device("cpu")) as peak:
        assert (tmp_path / "clear_refs").read_text() == "5"  # the mark is taken back before the block
    assert peak[0] == 2048 * 1024
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 777)
    with peak_memory(torch.device("cuda")) as peak:
        pass
    assert peak[0] == 777


# Times in pairs


class Ticking:
    """perf_counter of a clock that only what is timed moves on."""

    def __init__(self) -> None:
        self.at = 100.0

    def work(self, *seconds: float):
        left = iter(seconds)

        def take() -> None:
            self.at += next(left)

        return take


@pytest.fixture
def ticking(monkeypatch):
    clock = Ticking()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.at)
    return clock


def test_pairs_are_medians_after_a_first_that_does_not_count():
    ours, theirs = iter([90.0, 2.0, 4.0, 5.0]), iter([1.0, 4.0, 12.0, 20.0])
    found = timing.paired(lambda: next(ours), lambda: next(theirs), 3)
    # medians 4 and 12; ratios 2, 3, 4
    assert found == {"ratio": 3.0, "spread": 1.0, "ms": 4000.0, "baseline_ms": 12000.0}


def test_a_typical_time_is_the_median_and_fits_into_the_time_left(ticking):
    assert timing.typical(ticking.work(50.0, 3.0, 1.0, 2.0), 3) == 2.0
    with timing.within(20.0):
        assert timing.left() == 20.0 and timing.fitting(7, 1.0) == 4 and timing.fitting(3, 1.0) == 3
        assert timing.fitting(7, 30.0) == 1
        with timing.within(50.0):
            assert timing.left() == 20.0  # no more than outside
        assert (
            timing.typical(ticking.work(2.0, 7.0, 5.0, 0.0), 3) == 7.0
        )  # 18 s are left, a fifth holds one of 2 s
        ticking.at += 60
        assert math.isnan(timing.typical(ticking.work(1.0), 3)) and math.isnan(
            timing.paired(None, None)["ratio"]
        )
    assert timing.left() == math.inf


def test_a_row_of_times_holds_where_it_is_fast_and_near_its_bound():
    times = {"ratio": 2.0, "spread": 0.1, "ms": 8.0, "baseline_ms": 16.0}
    assert timing.row("a", times, 0.004, 2.0)["of_bound"] == pytest.approx(0.5)
    held = [timing.row("a", times, bound, target)["holds"] for bound, target in
            ((0.0041, 2.0), (None, 2.0), (0.0041, 2.1), (0.0039, 1.0))]  # fmt: skip
    assert held == [True, True, False, False]


# Times


def test_a_text_that_is_timed_is_read_again_from_its_start():
    source = SimpleNamespace(ids=lambda tokenizer: [5, 6, 7])
    bench = SimpleNamespace(source=lambda cell: source, tokenizer=SimpleNamespace(bos_token_id=1))
    sample = running_text(Cell("h2o", "perplexity", 8, what="timing"), 8, bench)
    assert sample.prompt == [1, 5, 6, 7, 5, 6, 7, 5]
    assert sample.answer == [6, 7, 5, 6, 7, 5, 6, 7, 5, 6, 7, 5, 6, 7, 5, 6]


def test_bytes_of_what_is_read_beside_its_labels():
    """Two texts, four query heads over two of keys, three slots each: keys of 8 and values of 4 numbers."""
    told = []
    k, v = torch.zeros(2, 2, 9, 8, dtype=torch.bfloat16), torch.zeros(2, 2, 9, 4)
    beside = torch.zeros(5, dtype=torch.float16)
    report_reading(SimpleNamespace(k=k, v=v, report_bytes=told.append), torch.zeros(2, 4, 3), beside)
    assert told == [5 * 2 + 2 * 4 * 3 * (8 * 2 + 4 * 4)]
