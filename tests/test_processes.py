"""A file's tests share one process, but where they share nothing else."""

import pytest
from tests.processes import BY_PAGE, SPREAD, group_of
from tests.quick import HERE

RUN: list[int] = []


@pytest.mark.parametrize("number", range(6))
def test_tests_of_a_file_run_in_one_process(number, request):
    """Each finds what those before it left behind."""
    RUN.append(number)
    asked = [item.callspec.params["number"] for item in request.session.items if item.path == request.path
             and item.originalname == request.node.originalname]  # fmt: skip
    assert asked[: asked.index(number) + 1] == RUN


def test_what_is_run_together():
    assert (
        group_of("tests/test_a.py::test_b[c]")
        == group_of("tests/test_a.py::TestD::test_e")
        == "tests/test_a.py"
    )
    one, other = (f"tests/{file}::test_b[c]" for file in ("test_every_page.py", "methods/test_every_page.py"))
    assert (group_of(one), group_of(other)) == (one, other)
    choices = [
        f"tests/{BY_PAGE}::{test}" for test in ("test_a[h2o-budget]", "test_b[h2o]", "test_b[kivi]", "test_c")
    ]
    groups = [group_of(test) for test in choices]
    assert groups[0] == groups[1] and len({*groups}) == 3 and groups[3] == f"tests/{BY_PAGE}"


def test_files_that_are_named_are_there():
    assert all((HERE / file).exists() for file in {*SPREAD, BY_PAGE})
