"""The claim of motion energy with attention: units tell directions, not phases; a step of attention resolves plaids.

    units      144 set filters of the page: 12 directions, three spatial and four temporal frequencies. Their responses,
               normalised, are asked for gratings that drift as each unit prefers, at 16 phases, and the other way round
    phase      the largest response less the smallest, over the mean, of the worst unit
    direction  (preferred - opposite) / (preferred + opposite), of the worst unit
    plaids     two gratings of one rigid motion: each moves across its own bars, the two together in one direction that
               need be neither between them. Noise on it. `overlaid` has both gratings everywhere; in `apart` each of
               4 x 4 apertures shows one of the two, so that no place sees more than the half (a pseudo-plaid)
    read       v = argmin Σ_k E'_k (f_k n_k·v - φ_k)²: each unit asks for a velocity on its line. `local` reads the
               responses of a place, `joined` those that one step of the page makes of all places
    error      degrees between v and the motion, mean over places and plaids

Nothing is trained: q and k are waves of the place, so that near places are alike, and the step has default settings.
What is shown is that places of one motion have to be joined; that attention learns which belong together is not.
"""

import math

import torch
from torch import Tensor

from regard.claims.lab import generator, mean, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.dense import motion_energy_attention as page

SIDE, APERTURE, FRAMES, NOISE = 48, 12, 10, 0.5
PLAIDS, SEEDS, PHASES = 64, (0, 1, 2), 16
WAVES, BEATS = (0.12, 0.17, 0.22), (0.1, 0.15, 0.2, 0.25)  # a place, a frame
FREQUENCY, FASTEST = (
    0.17,
    0.22,
)  # of the gratings of plaids: waves a place, and a frame if it moved across its bars
MOST, LEAST = (
    1.1,
    0.5,
)  # between a grating's own direction and that of its plaid; between two gratings (radians)


def units() -> tuple[Tensor, Tensor, Tensor]:
    """(angle, f, φ) of each unit."""
    angles = torch.arange(12.0) * math.pi / 6
    parts = torch.cartesian_prod(angles, torch.tensor(WAVES), torch.tensor(BEATS))
    return parts[:, 0], parts[:, 1], parts[:, 2]


def grating(angle: Tensor, f: Tensor, phi: Tensor, phase: Tensor, side: int, frames: int) -> Tensor:
    """[B, frames, side, side], of as many as there are angles; phases may differ from place to place."""
    at = torch.arange(side) - (side - 1) / 2
    u = angle.cos()[:, None, None] * at + angle.sin()[:, None, None] * at[:, None]
    t = torch.arange(frames)[:, None, None]
    moved = f[:, None, None, None] * u[:, None] - phi[:, None, None, None] * t
    return torch.cos(2 * math.pi * moved + phase.expand(len(angle), 1, side, side))


def tuning() -> dict[str, float]:
    """Of the worst unit: how much its response varies with phase, with one filter of the pair too, and direction."""
    angle, f, phi = units()
    space, time = page.space_time(angle, f, phi)
    side, frames = space.shape[1], time.shape[1]
    found: dict[str, list[Tensor]] = {"preferred": [], "opposite": [], "half": []}
    for i in range(PHASES):
        phase = torch.full((1, 1, 1, 1), 2 * math.pi * i / PHASES)
        for name, turned in (("preferred", 0.0), ("opposite", math.pi)):
            clips = grating(angle + turned, f, phi, phase, side, frames)
            middle = page.normalised(page.motion_energy(clips, space, time, stride=side // 2))[:, :, 1, 1]
            found[name].append(middle.diagonal())
            if name == "preferred":
                kernel = torch.einsum("kyx,kt->ktyx", space, time.flip(1)).real
                found["half"].append(torch.einsum("ktyx,ktyx->k", clips, kernel).square())
    preferred, opposite, half = (torch.stack(found[name]) for name in found)

    def varies(t: Tensor) -> float:
        return ((t.amax(0) - t.amin(0)) / t.mean(0)).max().item()

    p, o = preferred.mean(0), opposite.mean(0)
    index = ((p - o) / (p + o)).min().item()
    return {
        "varies_with_phase": varies(preferred),
        "varies_half_a_pair": varies(half),
        "direction_index": index,
    }


def plaids(seed: int, apart: bool) -> tuple[Tensor, Tensor]:
    """(clips [PLAIDS, FRAMES, SIDE, SIDE], directions [PLAIDS])."""
    g = generator(seed)
    direction = 2 * math.pi * torch.rand(PLAIDS, generator=g)
    first = MOST * (2 * torch.rand(PLAIDS, generator=g) - 1)
    # the other turns on from it, around within the range
    room = 2 * (MOST - LEAST)
    second = (first + MOST + LEAST + room * torch.rand(PLAIDS, generator=g)) % (2 * MOST) - MOST
    f, cells = torch.full((PLAIDS,), FREQUENCY), SIDE // APERTURE
    two = []
    for turned in (first, second):
        phase = 2 * math.pi * torch.rand(PLAIDS, 1, cells, cells, generator=g)
        phase = over(phase) if apart else phase[:, :, :1, :1]
        two.append(grating(direction + turned, f, FASTEST * turned.cos(), phase, SIDE, FRAMES))
    which = over((torch.rand(PLAIDS, 1, cells, cells, generator=g) < 0.5).float())
    clips = which * two[0] + (1 - which) * two[1] if apart else (two[0] + two[1]) / 2
    return clips + NOISE * torch.randn(clips.shape, generator=g), direction


def over(cells: Tensor) -> Tensor:
    """A number for each aperture, at all of its places."""
    return cells.repeat_interleave(APERTURE, 2).repeat_interleave(APERTURE, 3)


def joined(responses: Tensor) -> Tensor:
    """[B, N, K] after one step between places of a square grid that are alike where they are near."""
    cells = SIDE // APERTURE
    y, x = torch.meshgrid(*2 * (torch.arange(cells) * math.pi / cells,), indexing="ij")
    places = torch.stack([y.cos(), y.sin(), x.cos(), x.sin()], dim=-1).view(1, 1, -1, 4)
    q = places.expand(len(responses), -1, -1, -1)
    return page.fast(q, q, responses[:, None], page.Config(), Call("self"))[0][:, 0]


def velocity(responses: Tensor) -> Tensor:
    """[..., 2] (x, y) of responses [..., K] of the units."""
    angle, f, phi = units()
    n = f[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)  # [K, 2]
    lines = torch.einsum("...k,ki,kj->...ij", responses, n, n)
    return torch.linalg.solve(lines, torch.einsum("...k,k,ki->...i", responses, phi, n))


def errors(seed: int, apart: bool) -> dict[str, float]:
    """Degrees, local and joined."""
    clips, direction = plaids(seed, apart)
    space, time = page.space_time(*units())
    responses = page.motion_energy(clips, space, time, stride=APERTURE // 2)
    places = (
        page.normalised(responses)[:, :, 1::2, 1::2].flatten(2).mT
    )  # [B, N, K], in the middles of apertures
    found = {}
    for name, seen in (("local", places), ("joined", joined(places))):
        v = velocity(seen)
        off = torch.atan2(v[..., 1], v[..., 0]) - direction[:, None]
        found[name] = math.degrees(torch.atan2(off.sin(), off.cos()).abs().mean().item())
    return found


def measure() -> Measured:
    with threads(1):
        tuned = tuning()
        numbers: dict[str, float | list] = {**tuned}
        parts = {
            "phase": tuned["varies_with_phase"] < 0.05,
            "direction": tuned["direction_index"] >= 0.8,
        }
        for name, apart in (("overlaid", False), ("apart", True)):
            found = [errors(seed, apart) for seed in SEEDS]
            for side in ("local", "joined"):
                numbers[f"error_{name}_{side}"] = mean(one[side] for one in found)
                numbers[f"error_{name}_{side}_by_seed"] = [round(one[side], 2) for one in found]
            parts[f"plaids {name}"] = all(one["joined"] < one["local"] for one in found)
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="motion_energy_attention",
    statement=(
        "Motion-energy units respond to drifting gratings whatever their phase, and to one direction; one step of "
        "attention between places resolves the direction of plaids better than each place by itself"
    ),
    bound=(
        "of the worst unit: response varies over phase by < 5 %, direction index >= 0.8; error of the direction of "
        "plaids, overlaid and apart, below that of the local readout in 3 of 3 seeds"
    ),
    measure=measure,
)
