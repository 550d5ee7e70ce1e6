"""A demo set in words alone, the same task in every form that training takes: which of some numbers is the largest?

    sft_*.jsonl      messages, one or two turns
    pairs_*.jsonl    prompt, chosen, rejected
    unpaired_*.jsonl prompt, completion, label
    ranked_*.jsonl   conversations whose last answer is a list, best first
    text_*.txt       running text, paragraphs with a blank line between

each for `train` and `heldout`, with no two numbers compared in both.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

NUMBERS = range(10, 100)


def make_text(folder: str | Path, n_train: int = 1024, n_heldout: int = 192, seed: int = 0) -> None:
    """Write the files above.

    Args:
        folder: must not exist yet; appears whole or not at all.
        n_train, n_heldout: rows of each file.
        seed: everything random follows from it.

    Raises:
        UserError: the folder is there already.
    """
    from scripts.make_tiny_checkpoint import new_folder

    rng = np.random.default_rng([seed, 2])
    couples = np.array(list(itertools.combinations(NUMBERS, 2)))
    couples = couples[rng.permutation(len(couples))]
    cut = len(couples) * n_train // (n_train + n_heldout)
    with new_folder(folder) as folder:
        for split, count, pool in (("train", n_train, couples[:cut]), ("heldout", n_heldout, couples[cut:])):
            picked = rng.permuted(pool[rng.integers(len(pool), size=count)], axis=1).tolist()
            others = rng.choice(NUMBERS, count).tolist()
            makers = {"sft": _messages, "pairs": _pair, "unpaired": _unpaired, "ranked": _ranked}
            for name, maker in makers.items():
                lines = [json.dumps(maker(i, a, b, c)) for i, ((a, b), c) in enumerate(zip(picked, others))]
                (folder / f"{name}_{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            sentences = [f"{max(a, b)} is larger than {min(a, b)}." for a, b in picked]
            paragraphs = [" ".join(sentences[i : i + 8]) for i in range(0, count, 8)]
            (folder / f"text_{split}.txt").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def _question(a: int, b: int) -> str:
    return f"Which is larger, {a} or {b}?"


def _answer(number: int) -> str:
    return f"It is {number}."


def _turn(a: int, b: int) -> list[dict]:
    return [{"role": "user", "content": _question(a, b)}, {"role": "assistant", "content": _answer(max(a, b))}]


def _messages(i: int, a: int, b: int, c: int) -> dict:
    return {"messages": _turn(a, b) + (_turn(b, a) if i % 4 == 0 else [])}


def _pair(i: int, a: int, b: int, c: int) -> dict:
    answers = {"chosen": _answer(max(a, b)), "rejected": _answer(min(a, b))}
    return {"prompt": _turn(a, b)[:1]} | {key: [{"role": "assistant", "content": value}] for key, value in answers.items()}


def _unpaired(i: int, a: int, b: int, c: int) -> dict:
    label = i % 2 == 0
    answer = _answer(max(a, b) if label else min(a, b))
    return {"prompt": _turn(a, b)[:1], "completion": [{"role": "assistant", "content": answer}], "label": label}


def _ranked(i: int, a: int, b: int, c: int) -> dict:
    numbers = sorted({a, b, c}, reverse=True)  # two where c repeats one: lists need not be of one length
    question = f"Which is the largest of {', '.join(map(str, dict.fromkeys((a, b, c))))}?"
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": [_answer(n) for n in numbers]}]}
