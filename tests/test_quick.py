"""`make test` leaves out what is long, and sees what `make test-all` sees."""

from tests import quick


def test_what_is_left_out_is_there():
    sources = {}
    for test in quick.listed():
        file, _, name = test.partition("::")
        name = name.partition("[")[0].rpartition("::")[2]
        source = sources.setdefault(file, (quick.HERE.parent / file).read_text(encoding="utf8"))
        assert f"def {name}(" in source or name == "runTest", f"{test} is in long.txt and is no test"
    assert len(quick.listed()) > 100


def test_planted_faults_are_seen_by_what_stays():
    """All but one in a hundred: of each some test, or all of a function, is asked."""
    long, laws = quick.listed(), quick.laws()
    lost = [law for law in laws if all(quick.of(name, long) for name in law)]
    assert len(laws) > 900 and len(lost) <= len(laws) / 100, lost


def test_what_is_long_by_its_times():
    alone = [law[0] for law in quick.laws() if len(law) == 1 and law[0].endswith("]")]
    sees_alone = next(test for test in alone if not test.startswith(quick.STAY))
    times = {
        "tests/a.py::b": quick.LONG,
        "tests/a.py::c[1]": quick.LONG - 0.1,
        sees_alone: 3.0,
        quick.STAY[0] + "a]": 30.0,
    }
    assert quick.long_of(times) == ["tests/a.py::b"]
    assert quick.long_of({**times, sees_alone: quick.ALONE + 1}) == sorted(["tests/a.py::b", sees_alone])


def test_what_is_set_up_counts_for_all_of_its_file():
    rows = [
        "6.0 setup tests/a.py::b",
        "0.1 call tests/a.py::b",
        "0.0 setup tests/a.py::c d",
        "0.2 call tests/a.py::c d",
    ]
    assert quick.times_of([*rows, "4.0 setup tests/e.py::f", "0.3 call tests/e.py::f"]) == {
        "tests/a.py::b": 6.1, "tests/a.py::c d": 6.2, "tests/e.py::f": 0.3,
    }  # fmt: skip
