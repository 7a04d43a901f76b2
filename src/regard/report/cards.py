"""The methods of a run by their cards, and how to apply what it recommends: the end of the page."""

import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from regard.report.applied import advice, lines, settings_of
from regard.report.marks import Marks, glyph
from regard.report.pieces import breakable, section, words
from regard.report.result import Result
from regard.report.words import KEEPS, budget_order, budget_text, clean, listing, short

Card = Mapping[str, Any]
FACTS = (("paper", "Paper"), ("idea", "Idea"), ("cost", "Cost"), ("state", "Holds"), ("caveat", "Caveat"))
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def anchors(result: Result) -> dict[str, str]:
    """Label -> the id of its method's card, where the run brought one."""
    cards = result.run.get("cards") or {}
    labels = {r["label"]: r["method"] for r in result.summary() if r["method"] in cards}
    places = {method: f"card-{i}" for i, method in enumerate(sorted(set(labels.values())))}
    return {label: places[method] for label, method in labels.items()}


def linked(label: str, places: Mapping[str, str]) -> str:
    """A method's name, which leads to its card."""
    shown = breakable(label)
    return f'<a href="#{places[label]}">{shown}</a>' if label in places else f"<span>{shown}</span>"


def titles(result: Result) -> dict[str, str]:
    """Label -> the title of its card."""
    cards = result.run.get("cards") or {}
    return {r["label"]: str(cards[r["method"]]["title"]) for r in result.summary() if r["method"] in cards}


def card_section(result: Result, marked: Marks) -> str:
    """A card for each method of the run; nothing where the run is older than cards."""
    places = anchors(result)
    groups: dict[str, list[str]] = {}
    for label in marked:
        if label in places:
            groups.setdefault(places[label], []).append(label)
    each = [one_card(result, at, labels, marked) for at, labels in groups.items()]
    lead = "What each method does and costs, where it differs from its paper, and how it was set."
    return section("The methods", lead, "".join(each)) if each else ""


def one_card(result: Result, at: str, labels: list[str], marked: Marks) -> str:
    cards = result.run["cards"]
    method = next(r["method"] for r in result.summary() if r["label"] == labels[0])
    card = cards[method]
    parts = [part for part in card.get("parts") or () if part in cards]
    # of methods laid over one another each part by itself, but for a name of its own, which says its own first
    shown = [method, *(part for part in parts if part != method)] if "+" not in method else parts
    facts = "".join(
        (f"<h4>{escape(clean(cards[one]['title']))}</h4>" if len(shown) > 1 else "") + fact_list(cards[one])
        for one in shown
    )
    used = "".join(use(result, label) for label in labels)
    marks = " ".join(glyph(*marked[label]) for label in labels)
    head = f"<summary>{marks} {escape(clean(method))} <span>{escape(clean(card['title']))}</span></summary>"
    return f'<details class="method" id="{at}">{head}<div class="inside">{facts}{used}</div></details>'


def fact_list(card: Card) -> str:
    """Paper, idea, cost, state, caveat and the defaults of the settings, those that there are."""
    rows = []
    for key, head in FACTS:
        said = str(card.get(key) or "")
        if key == "paper" and said and card.get("year") and not re.search(r"\b(19|20)\d\d\b", said):
            said = f"{said} ({card['year']})"
        if said:
            rows.append(
                (head, ARXIV.sub(arxiv, words(clean(said))) if key == "paper" else words(clean(said)))
            )
    defaults = ", ".join(f"{key}={value}" for key, value in (card.get("defaults") or {}).items())
    rows += [("Defaults", f"<code>{escape(clean(defaults))}</code>")] if defaults else []
    return f"<dl>{''.join(f'<dt>{head}</dt><dd>{text}</dd>' for head, text in rows)}</dl>"


def arxiv(found: re.Match[str]) -> str:
    return f'<a href="https://arxiv.org/abs/{found[1]}" rel="noreferrer">{found[0]}</a>'


def use(result: Result, label: str) -> str:
    """The settings and budgets under which a method was measured, and the lines at the budget that serves best."""
    rows = [r for r in result.summary() if r["label"] == label]
    known = settings_of(result, label)
    set_to = ", ".join(f"{key}={value}" for key, value in (known["settings"] if known else {}).items())
    budgets = [budget_text(r["budget"]) for r in sorted(rows, key=lambda r: budget_order(r["budget"]))]
    said = [f"Settings: {set_to or 'the defaults'}."]
    said += [f"Budgets: {listing(filter(None, budgets))}."] if any(budgets) else []
    best, why = at_best(rows)
    said += [f"Below at {budget_text(best['budget'])}, {why}."] if best["budget"] is not None else []
    return f'<p class="meta">{words(clean(" ".join(said)))}</p>{code(lines(result, best))}'


def at_best(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The row at the least budget that keeps 95 %, or else the one of most quality."""
    whole = [r for r in rows if r["complete"]] or rows
    kept = [r for r in whole if (r["quality"] or 0) >= KEEPS - 1e-9]
    if kept:
        return min(kept, key=lambda r: budget_order(r["budget"])), "the least that keeps 95 %"
    return max(whole, key=lambda r: r["quality"] or 0), "where it kept most"


def code(found: Iterable[str]) -> str:
    text = "\n".join(found)
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>' if text else ""


def apply_section(result: Result) -> str:
    """What the page recommends as lines of Python; where nothing keeps 95 %, what is best at half the bytes."""
    found = advice(result)
    each = "".join(f"<h3>{words(a.why)}: {escape(a.name)}</h3>{code(a.lines)}" for a in found)
    model = short(clean(result.run.get("model") or "this model"))
    lead = f"On {model}, as it was measured here: `model` is the loaded model, `inputs` a tokenized prompt."
    return section("How to apply it", lead.replace("`", ""), each) if each else ""
