"""What is no number of anything is refused when settings are made, and a budget before a model runs."""

import re
from dataclasses import fields, replace

import pytest

import regard
from regard import catalog
from regard.testing.zoo import build

# -1 is one of these: a seed, a layer from the end, another row of the batch, a shift of shards
MAY_BE_NEGATIVE = {
    ("causalmm", "seed"), ("damro", "layer"), ("dcal", "partner"), ("fastervlm", "layer"), ("random_tokens", "seed"),
    ("s2_attention", "offset"), ("token_correlation_compression", "layer"),
    ("token_correlation_compression", "shallow"), ("vcd", "seed"), ("vmtc_cmai", "layer"), ("vtc_cls", "start"),
}  # fmt: skip


def counts():
    """(page, setting) of every setting that is a whole number, or may be one."""
    for name, page in catalog.every():
        for field in fields(page.config):
            value = getattr(page.config(), field.name)
            may = value is None and str(field.type) in ("int | None", "None | int")
            if (type(value) is int or may) and (name, field.name) not in MAY_BE_NEGATIVE:
                yield name, field.name


@pytest.mark.parametrize("name", sorted({name for name, _ in counts()}))
def test_a_count_of_less_than_none_is_refused(name):
    page = catalog.get(name)
    for setting in (s for n, s in counts() if n == name):
        with pytest.raises(ValueError, match="must hold"):
            replace(page.config(), **{setting: -1})


def test_what_may_be_negative_is_there_and_is_taken():
    for name, setting in MAY_BE_NEGATIVE:
        assert replace(catalog.get(name).config(), **{setting: -1})


@pytest.mark.parametrize("budget", [-1, 0, "-5", 0.0, 1.5, "64 MX"])
def test_a_budget_that_is_none_is_refused_before_anything_runs(budget):
    with pytest.raises(ValueError, match="budget"):
        regard.attach(build("llama")[0], "h2o", budget=budget)


def least(setting, rule):
    """The smallest value that a rule names for a setting; None: it names none."""
    for names, number in re.findall(r"(\w+(?:(?:, | and )\w+)*) (?:>=|(?:are|is) at least) (\d+)", rule):
        if setting in re.split(", | and ", names):
            return int(number)
    found = re.search(rf"(\d+) <= {setting}\b", rule)
    return int(found[1]) if found else 1 if re.search(r"\ba \w+ or more", rule) else None


def refusal(config, setting, value):
    """What is said of a value; "" where it is taken."""
    try:
        replace(config, **{setting: value})
    except ValueError as error:
        return str(error)
    return ""


def named():
    """(page, setting, number, rule) of the counts whose rule names the smallest one."""
    for name, setting in counts():
        with pytest.raises(ValueError, match="must hold") as error:
            replace(catalog.get(name).config(), **{setting: -1})
        rule = str(error.value).partition(" (")[0]
        if (number := least(setting, rule)) is not None:
            yield name, setting, number, rule


def test_the_smallest_that_a_rule_names_is_taken_and_the_one_below_is_not():
    asked = [*named()]
    assert len(asked) > 300
    for name, setting, number, rule in asked:
        config = catalog.get(name).config()
        with pytest.raises(ValueError, match="must hold"):
            replace(config, **{setting: number - 1})
        said = refusal(config, setting, number)  # another rule, or part of it, may want more
        assert rule not in said or ", " in rule, f"{name}: {setting}={number}: {said}"


def most():
    """(page, setting, whether it is taken, the largest number that its rule names, rule) of every number."""
    for name, page in catalog.every():
        for setting, value in vars(page.config()).items():
            if type(value) in (int, float):
                # past either end it is refused with its rule
                said = [refusal(page.config(), setting, type(value)(far)) for far in (10**9, -(10**9))]
                rule = next(
                    (r.partition(" (")[0] for r in said if re.search(rf"\b{setting} <=? \d", r)), None
                )
                if rule is not None:
                    way, number = re.search(rf"\b{setting} (<=?) (\d+(?:\.\d+)?)", rule).groups()
                    yield name, setting, way == "<=", type(value)(number), rule


def test_the_largest_that_a_rule_names_is_taken_and_the_one_above_is_not():
    asked = [*most()]
    assert len(asked) > 80 and {taken for _, _, taken, _, _ in asked} == {True, False}
    for name, setting, taken, number, rule in asked:
        config = catalog.get(name).config()
        above = number + (1 if type(number) is int else 1e-3)
        assert rule in refusal(config, setting, above), f"{name}: {setting}={above} is taken: {rule}"
        at = refusal(config, setting, number)
        assert (rule not in at) == taken, f"{name}: {setting}={number}: {at or 'it is taken'}"
