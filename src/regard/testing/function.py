"""A function of the user's as a page: q, k, v and what else its signature names go in, out and state come back.

It takes q [B, H, N, D], k [B, H, M, D], v [B, H, M, E] and whatever its signature names of ARGUMENTS below; anything
else must have a default. It returns out [B, H, N, E], or (out, state), or (out, state, aux). It may be slow, may be
causal always, and need not know float64: then it is asked in float32. How near its numbers must come follows from
its own rounding. `regard check` (testing/check.py) asks it the laws.
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, Unsupported, require, unknown
from regard.core.call import Call
from regard.core.shapes import PATTERNS
from regard.core.trees import tree_leaves
from regard.kinds.mechanism import Mechanism
from regard.testing.case import DTYPES, EXACT, B, Case, D, E, H, Inputs, NotApplicable, stores

ARGUMENTS = {
    "q": "queries [B, H, N, D]; also query",
    "k": "keys [B, H, M, D]; also key",
    "v": "values [B, H, M, E]; also value",
    "mask": "True = attend, [B, 1, 1, M] or [B, 1, N, M], beside causality; also attn_mask",
    "key_padding_mask": "[B, M], True = hidden, as in torch.nn.MultiheadAttention",
    "lengths": "[B] whole numbers: the keys of a row that are there, the rest is padding on the right",
    "state": "what an earlier call returned; left out, or None, at the start of a text; also initial_state",
    "return_state": "given True; also output_final_state, return_final_state",
    "causal": "True in causal_self, else False; also is_causal",
    "pattern": "self, causal_self, cross or causal_cross",
    "scale": "given D ** -0.5 where it has no default",
    "window": "how many keys a query sees, itself included; every key where it has no default",
}
ALSO = {
    "query": "q", "key": "k", "value": "v", "attn_mask": "mask", "initial_state": "state",
    "output_final_state": "return_state", "return_final_state": "return_state", "is_causal": "causal",
}  # fmt: skip
WIDE = 1 << 20  # a window that shows every key
SMALL = range(1, 10)  # lengths at which a counterexample is looked for first
LENGTHS = (*SMALL, 20, 33, 64, 65)
ROUNDINGS = 100  # how many times its own rounding error a function's numbers may differ


class CheckFailed(ValueError):
    """The question cannot be asked: the file or the function is at fault before any law is."""


@dataclass(frozen=True)
class Function:
    """A function of the user's and what its signature takes: {our name: the name it uses}."""

    call: Callable
    name: str
    file: Path
    takes: Mapping[str, str]
    required: frozenset[str]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """(out, state); `options` by our names, of which the function gets those that it takes."""
        options = {"q": q, "k": k, "v": v} | {
            name: value
            for name, value in options.items()
            if name in self.takes and (value is not None or name in self.required)
        }
        returned = self.call(**{self.takes[name]: value for name, value in options.items()})
        out, state, *_ = (*returned, None) if isinstance(returned, tuple) else (returned, None)
        shape = [*q.shape[:3], v.shape[3]]
        if not isinstance(out, Tensor) or list(out.shape) != shape:
            actual = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise CheckFailed(f"{self.name} returns {actual}, out is [B, H, N, E] = {shape}")
        return out, state if "state" in self.takes else None

    def locate(self, error: BaseException) -> str:
        """The error, and the last line of the user's file that it went through."""
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(self.file)]
        return f"{message} ({self.file.name}:{frames[-1].lineno}: {frames[-1].line})" if frames else message


def load(target: str) -> Function:
    """The function of "FILE.py:function"."""
    text, colon, name = target.rpartition(":")
    require(colon and text and name, "a function is written FILE.py:function", target=target)
    file = Path(text).expanduser().resolve()
    if not file.is_file():
        beside = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        if not beside:
            raise CheckFailed(f"there is no file {text}")
        raise unknown(f"file in {file.parent}", file.name, beside)
    module = imported(file)
    known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    defined = [n for n in known if getattr(vars(module)[n], "__module__", None) in (module.__name__, None)]
    if name not in vars(module):
        raise unknown(f"function in {file.name}", name, defined or known)
    return signature(vars(module)[name], name, file)


def imported(file: Path) -> ModuleType:
    """The file as a module; what lies beside it can be imported by it."""
    spec = importlib.util.spec_from_file_location(f"checked_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[module.__name__] = module  # dataclasses look for their module there
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except (Exception, SystemExit) as error:
        where = Function(print, file.stem, file, {}, frozenset()).locate(error)
        raise CheckFailed(f"{file.name} cannot be imported: {where}") from error
    finally:
        sys.path.remove(str(file.parent))
    return module


def signature(call: Callable, name: str, file: Path) -> Function:
    require(callable(call), "what is checked is a function", name=name, type=type(call).__name__)
    takes, required = {}, set()
    function = call.forward if isinstance(call, torch.nn.Module) else call
    for argument in inspect.signature(function).parameters.values():
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            continue
        ours = ALSO.get(argument.name, argument.name)
        needed = argument.default is argument.empty
        if ours in ARGUMENTS and ours not in takes and argument.kind != argument.POSITIONAL_ONLY:
            takes[ours] = argument.name
            required |= {ours} if needed else set()
        elif needed:
            names = ", ".join([*ARGUMENTS, *ALSO])
            raise CheckFailed(
                f"{name} needs {argument.name!r}, and the check can give only {names}, each by name"
            )
    missing = [letter for letter in "qkv" if letter not in takes]
    require(not missing, "the function takes q, k and v", function=name, missing=missing)
    return Function(call, name, file, takes, frozenset(required))


@dataclass(frozen=True)
class FunctionCase(Case):
    """The function as a page, and what it can do: found by calling."""

    width: int = E
    lengths: tuple[int, ...] = ()

    @property
    def paths(self) -> dict[str, Callable]:
        return {self.page.card.title: self.page.reference}

    @property
    def keeps_rows_apart(self) -> bool:
        """Nobody says so of a function: it is asked one question at a time."""
        return False

    def inputs(self, n: int, m: int | None = None, **options: Any) -> Inputs:
        return super().inputs(n, m, **{"width": self.width, **options})

    def able(self, inputs: Inputs, mask: Any = None, state: Any = None, **settings: Any) -> None:
        """A recurrence reads queries and keys together: fewer queries than keys is no question for it."""
        few = self.pattern == "causal_self" and inputs.q.shape[2] < inputs.k.shape[2]
        if few and self.page.state_size is not None and not stores(self):
            raise NotApplicable("its state has a fixed size: queries come with their keys")
        super().able(inputs, mask, state, **settings)


def as_page(
    function: Function, patterns: tuple[str, ...], double: bool, settings: Mapping[str, Any]
) -> Mechanism:
    """A page on the fly: the contract of a Mechanism around the function.

    Without float64 (`double` False) its inputs are rounded to float32 and its output is widened, so that every law
    can be asked alike.
    """

    def reference(q: Tensor, k: Tensor, v: Tensor, cfg: Any, call: Call) -> tuple[Tensor, Any]:
        low = q.dtype == torch.float64 and not double
        inputs = [t.float() if low else t for t in (q, k, v)]
        options = {"scale": getattr(cfg, "scale", None), "window": getattr(cfg, "window", None)}
        if "scale" in function.required and options["scale"] is None:
            options["scale"] = q.shape[-1] ** -0.5
        options |= {"pattern": call.pattern, "causal": call.pattern == "causal_self"}
        options |= {"return_state": True, "state": call.initial_state}
        try:
            out, end = function(*inputs, **options, **hiding(function, call, inputs[0]))
        except NotImplementedError as refusal:
            raise Unsupported(str(refusal) or "it is not implemented") from refusal
        return out.double() if low else out, end

    defaults = {"scale": None, "window": WIDE if "window" in function.required else None} | dict(settings)
    kept = [
        (name, object, field(default=defaults[name]))
        for name in ("scale", "window")
        if name in function.takes
    ]
    card = Card(title=function.name, paper="", year=0, idea="")
    config = make_dataclass("Config", kept, frozen=True)
    return Mechanism(config=config, card=card, patterns=patterns, reference=reference, pair_masks=True)


def hiding(function: Function, call: Call, q: Tensor) -> dict[str, Any]:
    """The mask in the words of the function."""
    if call.key_mask is None and call.pair_mask is None:
        return {}
    if "mask" in function.takes:
        return {"mask": call.pair_mask if call.key_mask is None else call.key_mask[:, :, None]}
    if not {"key_padding_mask", "lengths"} & set(function.takes):
        raise Unsupported("it takes no mask")
    if call.key_mask is None or call.key_mask.shape[1] > 1:
        raise Unsupported("it takes masks of keys only")
    key_mask = call.key_mask[:, 0].expand(q.shape[0], -1)
    if "key_padding_mask" in function.takes:
        return {"key_padding_mask": ~key_mask}
    if not bool((key_mask.long().diff(dim=1) <= 0).all()):
        raise Unsupported("lengths hide keys at the end only")
    return {"lengths": key_mask.sum(1)}


def probe(
    function: Function, pattern: str, settings: Mapping[str, Any]
) -> tuple[FunctionCase, dict[int, str]]:
    """What the function can do, and the lengths at which it fails with what it raised."""
    errors: list[Exception] = []
    attempts = [(n, double, width) for n in (7, 64) for double in (True, False) for width in (E, D)]
    for n, double, width in attempts:
        page = as_page(function, (pattern,), double, settings)
        case = FunctionCase(page, page.config(), pattern, width=width)
        try:
            case.run(page.reference, case.inputs(n, n + 2))
        except Exception as error:
            errors.append(error)
            continue
        return refined(function, case)
    plain = errors[3]  # 7 tokens, float32, one width: the most ordinary of the questions
    message = str(plain) if isinstance(plain, CheckFailed) else function.locate(plain)
    raise CheckFailed(f"{function.name} fails in {pattern} on q [{B}, {H}, 7, {D}]: {message}") from plain


def refined(function: Function, case: FunctionCase) -> tuple[FunctionCase, dict[int, str]]:
    """The case with the lengths, dtypes, patterns and precision that the function knows."""
    failed: dict[int, str] = {}
    for n in LENGTHS:
        try:
            case.run(case.page.reference, case.inputs(n, n + 2))
        except Exception as error:
            failed[n] = function.locate(error)
    case = replace(case, lengths=tuple(n for n in LENGTHS if n not in failed))
    n = next(n for n in (7, *reversed(case.lengths)) if n in case.lengths)
    known = [t for t in DTYPES if works(case, case.inputs(n, n + 2).to(t))]
    others = [p for p in PATTERNS if p != case.pattern and able_to(function, p)]
    others = [p for p in others if works(replace(case, pattern=p), case.inputs(n))]
    page = replace(case.page, patterns=(case.pattern, *others), state_size=growth(case))
    case = replace(case, page=page, dtypes=tuple(known))
    return replace(case, tol=max(EXACT, ROUNDINGS * rounding(case, n))), failed


def growth(case: FunctionCase) -> Callable[[Any, dict, int], int] | None:
    """A state_size that grows with the tokens if the function's state does; None where it returns none."""
    ends = [case.run(case.page.reference, case.inputs(n))[1] for n in case.lengths[:2]]
    if any(end is None for end in ends):
        return None
    sizes = {sum(leaf.numel() for leaf in tree_leaves(end)) for end in ends}
    return (lambda cfg, dims, n: n) if len(sizes) > 1 else (lambda cfg, dims, n: 1)


def able_to(function: Function, pattern: str) -> bool:
    """Whether the function can be asked for a pattern other than the one it is checked in."""
    return "pattern" in function.takes or ("causal" in function.takes and pattern in ("self", "causal_self"))


def works(case: FunctionCase, inputs: Inputs) -> bool:
    try:
        case.run(case.page.reference, inputs)
    except Exception:
        return False
    return True


def rounding(case: FunctionCase, n: int) -> float:
    """The function's own rounding error, relative to its largest output.

    Second differences over steps of 1e-7 are rounding and nothing else: what is smooth in them is of size 1e-14.
    """
    inputs, worst = case.inputs(n, n + 2), 0.0
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        by = {x: 1e-7 * torch.randn(t.shape, generator=g, dtype=t.dtype) for x, t in inputs.tensors().items()}
        steps = [{x: t + s * by[x] for x, t in inputs.tensors().items()} for s in (-1, 0, 1)]
        ends = [case.run(case.page.reference, replace(inputs, **step))[0] for step in steps]
        scale = max(1.0, ends[1].abs().max().item())
        worst = max(worst, (ends[0] - 2 * ends[1] + ends[2]).abs().max().item() / scale)
    return worst if worst == worst else 0.0  # NaN: extremes and equality will say so
