"""Subspace patches: what they leave alone, what the next map sees of their parts, bad input."""

import pytest
import torch

from regard.methods.tracing.subspace_patching_illusion import Config, along, measure

KW = {"dtype": torch.float64}


def given(width=9, r=2, rows=4):
    g = torch.Generator().manual_seed(0)
    base, source = torch.randn(2, 5, width, generator=g, **KW)
    basis = torch.linalg.qr(torch.randn(width, r, generator=g, **KW)).Q
    return base, source, basis, torch.randn(rows, width, generator=g, **KW)


def test_inside_it_is_the_source_and_outside_the_base():
    base, source, basis, weight = given()
    told = measure(base, source, basis, weight)
    assert torch.allclose(told.patched @ basis, source @ basis)
    rest = torch.eye(9, **KW) - basis @ basis.T
    assert torch.allclose(told.patched @ rest, base @ rest)


def test_one_direction_of_any_length():
    base, source, basis, weight = given(r=1)
    told = measure(base, source, basis, weight)
    for length in (1.0, -3.0, 1e-3):
        assert torch.allclose(along(base, source, length * basis[:, 0]), told.patched)


def test_the_null_part_alone_is_not_seen_and_the_row_part_keeps_to_the_row_space():
    base, source, basis, weight = given()
    told = measure(base, source, basis, weight)
    assert told.leak < 1e-12
    assert torch.allclose(told.row_norms**2 + told.null_norms**2, torch.ones(2, **KW))
    null = torch.linalg.svd(weight).Vh[4:].T  # [D, D - M]
    assert torch.allclose(told.row_only @ null, base @ null)
    hidden = measure(base, source, null[:, :2], weight)
    assert torch.allclose(hidden.row_only, base) and torch.allclose(
        hidden.patched @ weight.T, base @ weight.T
    )
    assert not torch.allclose(hidden.patched, base)


def test_where_everything_is_seen_the_row_part_is_the_patch():
    base, source, basis, weight = given(rows=12)
    for cfg in (Config(), Config(renormalised=False)):
        told = measure(base, source, basis, weight, cfg)
        assert torch.allclose(told.row_only, told.patched) and told.null_norms.max() < 1e-12


def test_the_row_part_as_it_is_goes_the_square_of_its_norm_as_far():
    base, source, basis, weight = given(r=1)
    unit, plain = (measure(base, source, basis, weight, Config(full)) for full in (True, False))
    assert torch.allclose(plain.row_only - base, unit.row_norms**2 * (unit.row_only - base))


def test_bad_input():
    base, source, basis, weight = given()
    for wrong in (
        (base, source[:4], basis, weight),
        (base, source, basis.T, weight),
        (base, source, basis, weight.T),
    ):
        with pytest.raises(ValueError, match="D"):
            measure(*wrong)
    with pytest.raises(ValueError, match="orthonormal"):
        measure(base, source, 2 * basis, weight)
    with pytest.raises(ValueError, match="not zero"):
        along(base, source, torch.zeros(9, **KW))
    with pytest.raises(ValueError, match="tolerance"):
        Config(tolerance=0)
