"""Which parts of one input carried a score: gradients along a path, parts taken away, and what such answers are worth.

    integrated gradients   a_i = (x_i - b_i) ∫_0^1 ∂_i f(b + t (x - b)) dt         Σ_i a_i = f(x) - f(b)
    expected gradients     the same, averaged over baselines b and places t that are drawn (Gradient-SHAP)
    occlusion              a_i = f(all parts) - f(all but part i)
    removal surrogate      f(m) ≈ c + a·m over random m in {0, 1}^n, few a_i other than 0 (Lasso)
    LIME                   the same line, near m = 1 weighed more, and ridge

The model is hidden behind a function of one input: `f(x [B, ...]) -> [B]` gives the scores of B variants of it, such as
embeddings between a baseline and the input, or of B masks [B, n], True where a part (token, sentence, patch) is kept.
What "taken away" means is the function's affair. No more than `batch` variants are asked at once, which changes memory
and time, never the result. All sums are in float64.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from regard.core import require
from regard.core.errors import NotInstalled
from regard.ops.ranks import rank_correlation

Scorer = Callable[[Tensor], Tensor]  # [B, ...] variants of one input -> [B] scores

SWEEPS, CLOSE = 100_000, 1e-8  # of the Lasso: at most, and how near to its minimum


# gradients on a path


def integrated_gradients(
    f: Scorer, inputs: Tensor, baseline: Tensor | float = 0.0, steps: int = 50, batch: int = 64
) -> Tensor:
    """Attributions like `inputs` [...], whose sum is f(inputs) - f(baseline) (see `completeness_gap`); float64.

    Gauss and Legendre's points on the path: exact where f is a polynomial of degree 2 · steps or less along it.

    >>> integrated_gradients(lambda x: x[:, 0] * x[:, 1] + x[:, 2] ** 2, torch.tensor([3.0, 2.0, 4.0]), steps=2)
    tensor([ 3.0000,  3.0000, 16.0000], dtype=torch.float64)
    """
    require(steps >= 1, "steps >= 1", steps=steps)
    baseline = torch.as_tensor(baseline, dtype=inputs.dtype, device=inputs.device).expand_as(inputs)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    places, shares = (torch.as_tensor(t, device=inputs.device) for t in ((nodes + 1) / 2, weights / 2))
    return _path(f, inputs, baseline[None].expand(steps, *inputs.shape), places, shares, batch)


def expected_gradients(
    f: Scorer, inputs: Tensor, baselines: Tensor, samples: int = 200, seed: int = 0, batch: int = 64
) -> Tensor:
    """Gradient-SHAP: attributions like `inputs` [...]; baselines [R, ...] and places on the path are drawn; float64.

    The sum is f(inputs) - the mean of f over baselines up to the error of so many samples.
    """
    require(samples >= 1, "samples >= 1", samples=samples)
    rule = "baselines are [R, ...] with R >= 1, each like the input"
    fits = baselines.dim() and len(baselines) and baselines.shape[1:] == inputs.shape
    require(fits, rule, baselines=baselines, inputs=inputs)
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(baselines), (samples,), generator=g).to(baselines.device)
    places = torch.rand(samples, generator=g, dtype=torch.float64).to(inputs.device)
    return _path(f, inputs, baselines[chosen], places, torch.full_like(places, 1 / samples), batch)


def completeness_gap(
    f: Scorer, attributions: Tensor, inputs: Tensor, baseline: Tensor | float = 0.0
) -> float:
    """f(inputs) - f(baseline) - Σ attributions: 0 for integrated gradients with enough steps."""
    baseline = torch.as_tensor(baseline, dtype=inputs.dtype, device=inputs.device).expand_as(inputs)
    with torch.no_grad():
        here, there = asked(f, torch.stack([inputs, baseline]), batch=2)
    return float(here - there - attributions.double().sum())


def _path(f: Scorer, x: Tensor, starts: Tensor, places: Tensor, shares: Tensor, batch: int) -> Tensor:
    """Σ_s share_s (x - start_s) ∇f(start_s + place_s (x - start_s)); starts [S, ...], places and shares [S]."""
    require(batch >= 1, "batch >= 1", batch=batch)
    total = torch.zeros_like(x, dtype=torch.float64)
    for rows in torch.arange(len(places), device=x.device).split(batch):
        start = starts[rows]
        way = x - start  # [b, ...]
        place = places[rows].view(-1, *[1] * x.dim())
        with torch.enable_grad():
            at = (start + place.to(x.dtype) * way).detach().requires_grad_()
            (slope,) = torch.autograd.grad(_scores(f, at).sum(), at)
        share = shares[rows].view_as(place)
        total += (share * way.double() * slope.double()).sum(0)
    return total


# parts taken away


def asked(f: Scorer, variants: Tensor, batch: int = 64) -> Tensor:
    """The scores [S] of variants [S, ...], float64, so many at once."""
    require(batch >= 1 and len(variants), "batch >= 1, one variant or more", batch=batch, variants=variants)
    return torch.cat([_scores(f, part).detach().double() for part in variants.split(batch)])


def _scores(f: Scorer, variants: Tensor) -> Tensor:
    scores = f(variants)
    require(scores.shape == (len(variants),), "a score for each variant", scores=scores, variants=variants)
    return scores


@torch.no_grad()
def occlusion(f: Scorer, n: int, batch: int = 64) -> Tensor:
    """[n] what the score loses without each part; f is given masks [B, n].

    >>> occlusion(lambda m: m[:, 0] + 2.0 * (m[:, 1] & m[:, 2]), 3)
    tensor([1., 2., 2.], dtype=torch.float64)
    """
    require(n >= 1, "one part or more", n=n)
    whole = torch.ones(1, n, dtype=torch.bool)
    scores = asked(f, torch.cat([whole, ~torch.eye(n, dtype=torch.bool)]), batch)
    return scores[0] - scores[1:]


def removal_masks(n: int, samples: int, seed: int = 0, keep: float = 0.5) -> Tensor:
    """Bool [samples, n]: each part of each variant is kept with this probability."""
    require(n >= 1 and samples >= 1, "one part and one sample or more", n=n, samples=samples)
    require(0 < keep < 1, "0 < keep < 1", keep=keep)
    return torch.rand(samples, n, generator=torch.Generator().manual_seed(seed)) < keep


@torch.no_grad()
def removal_surrogate(
    f: Scorer,
    n: int,
    samples: int = 64,
    seed: int = 0,
    alpha: float = 0.01,
    keep: float = 0.5,
    batch: int = 64,
) -> Tensor:
    """[n] what each part adds to the score: a sparse line fitted to random removals, as ContextCite (2024) does.

    `alpha` is in units of the score (the paper: log-odds of the answer, a token): a part that moves it by less than
    about 2 · alpha gets 0 at keep = 1/2, since columns are divided by their spread before they are fitted.
    """
    masks = removal_masks(n, samples, seed, keep)
    return lasso(masks.double(), asked(f, masks, batch), alpha)[0]


def lasso(x: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, float]:
    """(w [n], c) that minimise |y - c - x w|² / 2S + alpha Σ_i spread(x_i) |w_i| over x [S, n] and y [S]; float64.

    scikit-learn's, on columns divided by their spread; a column without spread gets 0.

    >>> x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    >>> lasso(x, 3 * x[:, 0] + 0.1 * x[:, 1], alpha=0.1)[0]  # 2 alpha off the first, the second is smaller than that
    tensor([2.8000, 0.0000], dtype=torch.float64)
    """
    require(alpha > 0, "alpha > 0", alpha=alpha)
    require(x.dim() == 2 and y.shape == x.shape[:1] and len(y), "x [S, n] and y [S]", x=x, y=y)
    try:
        from sklearn.linear_model import Lasso
    except ImportError as error:
        raise NotInstalled(
            "a sparse surrogate is fitted by scikit-learn: pip install 'regard[explain]'"
        ) from error
    x, y = x.double(), y.double()
    spread = x.std(0, correction=0)
    w = torch.zeros_like(spread)
    known = spread > 0
    if bool(known.any()):
        columns = ((x - x.mean(0))[:, known] / spread[known]).cpu().numpy()
        line = Lasso(alpha, fit_intercept=False, tol=CLOSE, max_iter=SWEEPS)
        found = line.fit(columns, (y - y.mean()).cpu().numpy()).coef_
        w[known] = torch.as_tensor(found, device=x.device) / spread[known]
    return w, float(y.mean() - x.mean(0) @ w)


@torch.no_grad()
def lime(
    f: Scorer,
    n: int,
    samples: int = 1000,
    seed: int = 0,
    width: float = 0.25,
    alpha: float = 1.0,
    batch: int = 64,
) -> Tensor:
    """[n] LIME (2016) on removals, as its text explainer does it: ridge, and weights e^{-d² / 2 width²}.

    The first variant is the input; the others lose a number of parts drawn from 1..n, then which. d is the cosine
    distance 1 - √(kept / n) of a mask to the whole.
    """
    require(n >= 1 and samples >= 2, "one part, two samples or more", n=n, samples=samples)
    require(width > 0 and alpha >= 0, "width > 0 and alpha >= 0", width=width, alpha=alpha)
    g = torch.Generator().manual_seed(seed)
    lost = torch.randint(1, n + 1, (samples, 1), generator=g)
    lost[0] = 0
    masks = torch.rand(samples, n, generator=g).argsort(1).argsort(1) >= lost
    far = 1 - masks.double().mean(1).sqrt()
    return ridge(masks.double(), asked(f, masks, batch), (-(far**2) / (2 * width**2)).exp(), alpha)


def ridge(x: Tensor, y: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """w [n] that minimises Σ_s weight_s (y_s - c - x_s·w)² + alpha |w|² over w and c; x [S, n], y and weights [S]."""
    x, y = (t - weights @ t / weights.sum() for t in (x, y))
    gram = (x.T * weights) @ x + alpha * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(gram, x.T @ (weights * y))


# what attributions are worth


def linear_datamodelling_score(scores: Tensor, masks: Tensor, effects: Tensor) -> float:
    """Rank correlation (Spearman) of Σ_i score_i mask_i with what the model says of masks that were not fitted.

    scores [n]; masks [S, n]; effects [S] = f(masks). 0 where one of both sides is the same for all masks.

    >>> masks = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    >>> round(linear_datamodelling_score(torch.tensor([1.0, 2, 3]), masks, torch.tensor([0.1, 9, 0.2])), 6)
    0.5
    """
    require(
        masks.shape == (len(effects), len(scores)),
        "masks [S, n]",
        masks=masks,
        scores=scores,
        effects=effects,
    )
    require(len(effects) >= 2, "two masks or more", effects=effects)
    return float(rank_correlation(masks.double() @ scores.double(), effects.double()).nan_to_num(0.0))


@torch.no_grad()
def top_k_drop(f: Scorer, scores: Tensor, k: int) -> float:
    """What the score loses without the k parts of the highest scores [n] (of equal ones, the first); f takes masks.

    >>> top_k_drop(lambda m: m.double() @ torch.tensor([1.0, 5.0, 2.0]).double(), torch.tensor([0.0, 0.9, 0.3]), k=2)
    7.0
    """
    n = len(scores)
    require(1 <= k <= n, "1 <= k <= parts", k=k, parts=n)
    masks = torch.ones(2, n, dtype=torch.bool)
    masks[1, scores.argsort(descending=True, stable=True)[:k].cpu()] = False
    whole, without = asked(f, masks, batch=2)
    return float(whole - without)
