"""What the machine multiplies decides the dtype of products, on every page; either answer gives the same numbers."""

import itertools
import os
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import regard
from regard import catalog
from regard.core import Unsupported
from regard.kinds.mechanism import Mechanism
from regard.ops import machine
from regard.ops.blocks.attention import block_attention
from regard.ops.blocks.layout import Blocks
from regard.ops.linear import linear
from regard.ops.machine import product_dtype, products_in
from regard.ops.softmax import mix, scores
from regard.testing.case import Case, gradients
from regard.testing.laws.numbers import check_precision

NAMES = [name for name, page in catalog.every() if isinstance(page, Mechanism)]
PRODUCTS = ("aten::mm", "aten::bmm", "aten::baddbmm", "aten::addmm", "aten::mv", "aten::addmv", "aten::dot",
            "aten::addbmm")  # fmt: skip
ANSWERS = (torch.float32, "native")
LOW = {"c10::BFloat16", "c10::Half"}


def case_of(name: str) -> Case:
    page = catalog.get(name)
    pattern = "causal_self" if "causal_self" in page.patterns else page.patterns[0]
    return Case(page, page.config(), pattern)


def low_products(work) -> set[str]:
    """The products of low precision that work() takes, by name, those inside operators of torch.library too."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        work()
    events = seen.profiler.kineto_results.events()
    return {e.name() for e in events if e.name() in PRODUCTS and LOW & set(e.dtypes())}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_near_its_reference_whatever_the_machine(name, answer):
    with products_in(answer):
        check_precision(case_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_whatever_the_machine(name):
    case = case_of(name)
    path = case.page.fast or case.page.reference
    inputs = case.inputs(70, 72).to(torch.bfloat16)
    found = {}
    for answer in ANSWERS:
        with products_in(answer):
            found[answer] = gradients(case, path, inputs)[2]
    exact = gradients(case, path, inputs.to(torch.float64))[2]
    for key, wanted in exact.items():
        for answer in ANSWERS:
            given = found[answer][key].double()
            assert given.isfinite().all(), f"{key}, {answer}"
            # a choice that one dtype makes otherwise moves single gradients: the whole is compared
            off = (given - wanted).norm() / wanted.norm().clamp(min=1e-3)
            assert off < 0.25, f"{key}, {answer}: {off:.2g}"


@pytest.mark.parametrize("name", [n for n in NAMES if catalog.get(n).fast])
def test_no_page_multiplies_what_the_machine_does_not(name):
    page = catalog.get(name)
    for pattern, dtype in itertools.product(page.patterns, machine.LOW):
        case = Case(page, page.config(), pattern)
        inputs = case.inputs(70, 72).to(dtype)
        with products_in(torch.float32):
            found = low_products(partial(gradients, case, case.page.fast, inputs))
            assert not found, f"{pattern}, {dtype}: {found}"


def test_the_detector_sees_products():
    q = torch.randn(1, 2, 70, 8, dtype=torch.bfloat16)
    with products_in("native"):
        assert low_products(lambda: linear(q, q, q))
        assert low_products(lambda: scores(q, q, 1.0))


def test_the_machine_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    monkeypatch.setattr(machine, "RATES", {})
    monkeypatch.setattr(machine, "measured", lambda dtype: asked.append(dtype) or 0.02)
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    threads = [threading.Thread(target=product_dtype, args=(x,)) for _ in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert product_dtype(x) == torch.float32
    assert asked == [torch.bfloat16]
    assert product_dtype(x.double()) == torch.float64 and product_dtype(x.float()) == torch.float32
    assert product_dtype(x.to("meta")) == torch.bfloat16
    assert asked == [torch.bfloat16]


@pytest.mark.parametrize(
    ("rate", "dtype"), [(0.02, torch.float32), (0.99, torch.float32), (1.0, torch.bfloat16)]
)
def test_products_stay_where_they_are_as_fast(monkeypatch, rate, dtype):
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    monkeypatch.setattr(machine, "RATES", {torch.bfloat16: rate})
    assert product_dtype(torch.ones(2, dtype=torch.bfloat16)) == dtype


def test_the_rate_is_that_of_products(monkeypatch):
    """Measured anew: a number, the threads as they were, and no mode of the asker inside."""
    monkeypatch.setattr(machine, "RATES", {})
    before = torch.get_num_threads()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert 1e-4 < machine.rate(torch.bfloat16) < 100
    assert torch.get_num_threads() == before


def test_an_error_while_asking_is_the_askers(monkeypatch):
    def broken(dtype):
        raise RuntimeError("no products")

    monkeypatch.setattr(machine, "RATES", {})
    monkeypatch.setattr(machine, "measured", broken)
    with pytest.raises(RuntimeError, match="no products"):
        machine.rate(torch.bfloat16)


def test_forcing_is_undone_and_of_one_thread(monkeypatch):
    monkeypatch.setattr(machine, "RATES", {torch.bfloat16: 2.0})
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    x, seen = torch.ones(2, dtype=torch.bfloat16), []
    with products_in(torch.float32):
        assert product_dtype(x) == torch.float32
        with products_in("native"):
            assert product_dtype(x) == torch.bfloat16
        assert product_dtype(x) == torch.float32
        other = threading.Thread(target=lambda: seen.append(product_dtype(x)))
        other.start(), other.join()
    assert product_dtype(x) == torch.bfloat16 and seen == [torch.bfloat16]
    with pytest.raises(KeyError), products_in("float32"):
        raise KeyError
    assert product_dtype(x) == torch.bfloat16
    with pytest.raises(ValueError, match=r"float32.*native.*bfloat16"), products_in(torch.bfloat16):
        pass


def test_the_environment_forces_it(monkeypatch):
    x = torch.ones(2, dtype=torch.bfloat16)
    monkeypatch.setattr(machine, "RATES", {torch.bfloat16: 2.0})
    monkeypatch.setenv(machine.VARIABLE, "float32")
    assert product_dtype(x) == torch.float32
    monkeypatch.setenv(machine.VARIABLE, "native")
    monkeypatch.setattr(machine, "RATES", {torch.bfloat16: 0.1})
    assert product_dtype(x) == torch.bfloat16
    monkeypatch.setenv(machine.VARIABLE, "fp32")
    with pytest.raises(ValueError, match=r"REGARD_CPU_PRODUCTS is one of .*value='fp32'"):
        product_dtype(x)


def test_nothing_is_asked_at_import():
    code = "import regard.nn, regard.ops.machine as m, threading; print(m.RATES, threading.active_count())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert ran.stdout.strip() == "{} 1", ran.stderr


@pytest.mark.parametrize("answer", ANSWERS)
def test_torch_compile_takes_it_as_a_constant(monkeypatch, answer):
    """One graph, without a break, asked for before anything was measured; no product is timed inside."""
    monkeypatch.setattr(machine, "RATES", {})
    q, k, v = torch.randn(3, 1, 2, 70, 8).bfloat16().unbind(0)

    def attend(q, k, v):
        return mix(scores(q, k, 0.5).softmax(-1), v), linear(q, k, v)[0], block_attention(
            q, k, v, Blocks.of_map(torch.ones(1, 1, 2, 2, dtype=torch.bool), 64, 64), scale=0.5)[0]  # fmt: skip

    torch._dynamo.reset()
    with products_in(answer), torch.no_grad():
        wanted = attend(q, k, v)
        found = torch.compile(attend, backend="eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(found, wanted)
    torch._dynamo.reset()


def test_a_first_probe_may_come_while_a_graph_is_traced(monkeypatch):
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    monkeypatch.setattr(machine, "RATES", {})
    q = torch.randn(1, 2, 70, 8).bfloat16()
    torch._dynamo.reset()
    found = torch.compile(lambda q: scores(q, q, 0.5), backend="eager", fullgraph=True)(q)
    assert list(machine.RATES) == [torch.bfloat16]
    torch.testing.assert_close(found, scores(q, q, 0.5))
    torch._dynamo.reset()


def test_backward_goes_by_what_forward_decided():
    """An answer that changes between the two would cut the text into other tiles than those that were kept."""
    q, k, v = (torch.randn(1, 1, 9000, 64).bfloat16().requires_grad_() for _ in range(3))
    grads = {}
    for answer, after in ((torch.float32, "native"), ("native", torch.float32)):
        with products_in(answer):
            out = linear(q, k, v)[0]
        with products_in(after):
            grads[answer] = torch.autograd.grad(out.float().square().mean().sqrt(), (q, k, v))
    for one, other in zip(*grads.values()):
        assert (one - other).float().norm() / one.float().norm() < 0.02


def test_a_long_text_is_widened_in_pieces(monkeypatch):
    """Pieces change the speed, never the numbers."""
    q, k = torch.randn(2, 8, 3, 16).bfloat16(), torch.randn(2, 4, 1000, 16).bfloat16()
    weights = torch.rand(2, 8, 3, 1000)
    with torch.no_grad(), products_in(torch.float32):
        whole = scores(q, k, 0.3), mix(weights, k)
        monkeypatch.setattr("regard.ops.softmax.PIECE", 7 * 2 * 4 * 16)
        torch.testing.assert_close((scores(q, k, 0.3), mix(weights, k)), whole, rtol=2e-2, atol=1e-4)


def test_what_is_forced_is_what_attend_does():
    q = torch.randn(1, 2, 70, 8).bfloat16()
    with products_in(torch.float32):
        assert not low_products(
            lambda: regard.attend(q, q, q, "softmax", mask=catalog.method("window", window=4))
        )


def test_facts_of_the_machine(monkeypatch):
    monkeypatch.setattr(machine, "RATES", {torch.bfloat16: 0.02})
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    facts = machine.cpu_facts()
    assert facts["cpu"] and facts["multiplies_bf16"] is False and facts["bf16_rate"] == 0.02
    said = machine.slow_on_cpu(torch.bfloat16, "cpu")
    assert "bfloat16 products run at 0.02 of float32's rate" in said and facts["cpu"] in said
    assert machine.slow_on_cpu(torch.float32, "cpu") is None
    assert machine.slow_on_cpu(torch.bfloat16, "cuda") is None
    monkeypatch.setattr(machine, "RATES", {torch.bfloat16: 2.0})
    assert machine.slow_on_cpu(torch.bfloat16, "cpu") is None


def test_a_page_that_refuses_says_so_under_either_answer():
    q = torch.ones(1, 2, 3, 8, dtype=torch.bfloat16)
    for answer in ANSWERS:
        with products_in(answer), pytest.raises(Unsupported):
            regard.attend(q, q, q, "softmax", impl="triton")
