"""What the dictionary of `regard explain` must hold before anything is drawn of it: an error names the field."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from regard.core.errors import require

Found = Mapping[str, Any]
METHODS = 25  # a letter each, of which one is kept for attention


def checked(found: Found) -> Found:
    """The same dictionary, or ValueError.

    >>> checked({"tokens": ["a"], "target": "b", "clean": float("nan")})
    Traceback (most recent call last):
    ...
    ValueError: must hold: every number is finite (field='clean', value=nan)
    """
    for name in ("tokens", "target"):
        require(found.get(name) is not None, "an explanation has tokens and a target", missing=name)
    for name in ("target", "foil"):
        told = found.get(name)
        require(told is None or isinstance(told, str), "an answer is text", field=name, value=told)
    methods = len(found.get("sources") or [])
    require(methods <= METHODS, f"at most {METHODS} methods score the text", methods=methods)
    for field, value in leaves(found, ""):
        if isinstance(value, float) and not math.isfinite(value):
            require(False, "every number is finite", field=field, value=value)
    tokens = len(found["tokens"])
    if found.get("token_roles") is not None:
        as_long("token_roles", found["token_roles"], tokens)
    for i, source in enumerate(found.get("sources") or []):
        row(f"sources[{i}].scores", source.get("scores"), tokens)
        curve(f"sources[{i}].drop", source.get("drop"), "k")
    for i, head in enumerate(found.get("heads") or []):
        if head.get("attention"):
            row(f"heads[{i}].attention.weights", head["attention"].get("weights"), tokens)
    curve("faithfulness", found.get("faithfulness"), "share")
    effects(found.get("effects"))
    edges(found.get("graph"))
    return found


def leaves(value: object, field: str) -> Iterator[tuple[str, object]]:
    """Every value that holds no others, with the path to it."""
    if isinstance(value, Mapping):
        for key, inside in value.items():
            yield from leaves(inside, f"{field}.{key}" if field else str(key))
    elif isinstance(value, list | tuple):
        for i, inside in enumerate(value):
            yield from leaves(inside, f"{field}[{i}]")
    else:
        yield field, value


def as_long(field: str, values: object, length: int) -> None:
    long = len(values) if isinstance(values, Sequence) else None
    require(long == length, "as many values as there are places", field=field, values=long, places=length)


def row(field: str, values: object, length: int) -> None:
    """[length] numbers or None."""
    as_long(field, values, length)
    for i, value in enumerate(values):  # type: ignore[arg-type, var-annotated]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        require(value is None or number, "a number or null", field=f"{field}[{i}]", value=value)


def curve(field: str, found: Found | None, over: str) -> None:
    """A mean and its ends over rising places, none of which is missing."""
    if not found:
        return
    places = found.get(over) or []
    require(
        isinstance(places, Sequence) and len(places),
        "there are places",
        field=f"{field}.{over}",
        places=places,
    )
    rising = None not in places and all(a < b for a, b in pairwise(places))
    require(rising, "places rise", field=f"{field}.{over}", places=places)
    for key in ("mean", "low", "high"):
        if key == "mean" or found.get(key) is not None:
            row(f"{field}.{key}", found.get(key), len(places))


def effects(found: Found | None) -> None:
    if not found:
        return
    layers, heads = len(found["layers"]), int(found["heads"])
    for key in ("mean", "low", "high", "exact"):
        if key != "mean" and found.get(key) is None:
            continue
        as_long(f"effects.{key}", found.get(key), layers)
        for i, values in enumerate(found[key]):
            (as_long if key == "exact" else row)(f"effects.{key}[{i}]", values, heads)
    for key, values in (found.get("mlp") or {}).items():
        as_long(f"effects.mlp.{key}", values, layers)


def edges(graph: Found | None) -> None:
    known = {node["id"] for node in (graph or {}).get("nodes") or []}
    for i, edge in enumerate((graph or {}).get("edges") or []):
        for end in ("from", "to"):
            node = owner(edge[end], known)
            require(
                node in known,
                "an edge joins nodes of the graph",
                field=f"graph.edges[{i}].{end}",
                node=edge[end],
            )
        number = edge.get("score")
        require(
            isinstance(number, int | float),
            "an edge has a score",
            field=f"graph.edges[{i}].score",
            value=number,
        )


def owner(end: str, known: Mapping[str, Any] | set[str]) -> str:
    """The node of an edge's end: `L3H2` of `L3H2.k`."""
    return end if end in known else end.rpartition(".")[0]
