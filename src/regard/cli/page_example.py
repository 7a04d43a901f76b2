"""One small example of a task, made without a model: what is asked and what the right answer is."""

from contextlib import suppress
from typing import Any

from regard.cli.page_words import ids_text, labelled, middle_cut
from regard.report.words import clean

LENGTHS = (128, 256, 512, 1024, 2048)  # tokens of a prompt, the first that has room is taken
QUESTION = "\nQuestion:"


def example_of(page: Any, cfg: Any) -> dict[str, Any]:
    """Of a task page under these settings; ValueError where none of 2,048 tokens can be made."""
    if page.samples is not None:
        return asked_in_words(page, cfg)
    if page.pictures is not None:
        return asked_of_picture(page, cfg)
    inputs, labels = page.generate(cfg, 1, 0)
    return {"inputs": inputs[0].tolist(), "labels": labels[0].tolist()}


def asked_in_words(page: Any, cfg: Any) -> dict[str, Any]:
    """The middle one of three samples, in the tokens of the shipped model."""
    tokenizer = shipped_tokenizer()
    sample = next(filter(None, (made(page, cfg, tokenizer, length) for length in LENGTHS[:-1])), None)
    sample = sample or page.samples(cfg, tokenizer, LENGTHS[-1], 3, 0)[1]
    prompt, question = parted(tokenizer.decode(sample.prompt, skip_special_tokens=True))
    turns = [{"question": t.question, "answer": t.answer} for t in sample.turns]
    found = {
        "tokens": len(sample.prompt),
        "prompt": prompt,
        "needed": [tokenizer.decode(sample.prompt[first:end]).strip() for first, end in sample.needed],
        "question": question,
        "answer": ", ".join(sample.wanted) or tokenizer.decode(sample.answer).strip(),
        "wanted": list(sample.wanted),
        "turns": [{key: tokenizer.decode(ids).strip() for key, ids in turn.items()} for turn in turns],
    }
    return {key: value for key, value in found.items() if value}


def made(page: Any, cfg: Any, tokenizer: Any, length: int) -> Any:
    with suppress(ValueError):  # no room in so few tokens
        return page.samples(cfg, tokenizer, length, 3, 0)[1]
    return None


def parted(text: str) -> tuple[str, str]:
    """(what stands before, the question at the end); the latter is empty where there is none."""
    at = text.rfind(QUESTION)
    return (text, "") if at < 0 else (text[:at].strip("\n"), text[at:].strip())


def asked_of_picture(page: Any, cfg: Any) -> dict[str, Any]:
    asked = page.pictures(cfg, 1, 0)[0]
    found = {
        "picture": list(asked.picture.shape),
        "question": asked.text,
        "answer": asked.answer,
        "objects": list(asked.objects),
    }
    return {key: value for key, value in found.items() if value}


def shipped_tokenizer() -> Any:
    from transformers import AutoTokenizer

    from regard.models.shipped import SHIPPED

    return AutoTokenizer.from_pretrained(SHIPPED["lm"])


def example_lines(example: dict[str, Any], width: int) -> list[str]:
    """Label and text of each part, long ones without their middle."""
    texts: list[tuple[str, str]] = []
    for label, value in example.items():
        if label in ("inputs", "labels"):
            texts.append((label, ids_text(value)))
        elif label == "turns":
            texts += [("then", f"{middle_cut(turn['question'], 160)} {turn['answer']}") for turn in value]
        elif label == "picture":
            texts.append((label, f"{' x '.join(map(str, value))} pixels"))
        elif label == "needed":
            texts += [(label, middle_cut("; ".join(value), 160))]
        elif label == "objects":
            texts.append((label, ", ".join(value)))
        elif isinstance(value, str):
            texts.append((label, middle_cut(value, 320)))
    return [line for label, text in texts for line in labelled(label, clean(text), width)]
