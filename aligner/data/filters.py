"""Which rows of a dataset to keep: duplicates, unwanted words, other scripts, benchmarks' own questions; and pairs from scored answers.

Every filter is a function of texts to a [N] bool array, True for what is kept; `python -m aligner.data` applies them to files.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from aligner.data.samples import (
    Bad,
    Document,
    Preference,
    Prompt,
    Ranked,
    Stepwise,
    Supervised,
    Triple,
    TwoSided,
    Unpaired,
    best_first,
    is_conversation,
    parts_of,
)

_PRIME = (1 << 31) - 1
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"  # Chinese and Japanese characters: no spaces part their words
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation, each Chinese or Japanese character one; what duplicates and overlaps are judged by."""
    return _WORD.findall(text.lower())


def plain(text: Any) -> str:
    """The words of a conversation or text, one part a line."""
    return "\n".join(part["text"] for part in parts_of(text) if part["type"] == "text") if text else ""


def texts_of(sample: Any) -> tuple[str, str]:
    """(what is asked, what is answered) in a sample of any kind."""
    match sample:
        case Preference():
            return plain(sample.prompt), "\n".join((plain(sample.chosen), plain(sample.rejected)))
        case Ranked():
            return plain(sample.prompt), "\n".join(map(plain, sample.completions))
        case Unpaired():
            return plain(sample.prompt), plain(sample.completion)
        case Supervised(conversation=talk, prompt=""):
            asked = [message for message in talk if message["role"] != "assistant"] if is_conversation(talk) else ""
            said = [message for message in talk if message["role"] == "assistant"] if is_conversation(talk) else talk
            return plain(asked), plain(said)
        case Supervised():
            return plain(sample.prompt), plain(sample.conversation)
        case Document():
            return "", plain(sample.text)
        case Prompt():
            return plain(sample.prompt), ""
        case Stepwise():
            return plain(sample.prompt), "\n".join(sample.steps)
        case Triple(pair=pair, gold=gold):
            asked, answered = texts_of(pair)
            return asked, f"{answered}\n{plain(gold)}"
        case TwoSided(good=good, bad=bad):
            return tuple(map("\n".join, zip(texts_of(good), texts_of(bad))))
    raise TypeError(f"no sample: {type(sample).__name__}")


def first_of_equals(texts: Iterable[str]) -> np.ndarray:
    """Keep the first of texts that have the same words."""
    seen: set[bytes] = set()
    keep = []
    for text in texts:
        digest = hashlib.sha256(" ".join(words_of(text)).encode()).digest()
        keep.append(digest not in seen)
        seen.add(digest)
    return np.array(keep, bool)


def first_of_similar(texts: Iterable[str], threshold: float = 0.8, size: int = 5, hashes: int = 128, seed: int = 0) -> np.ndarray:
    """Keep the first of texts whose sets of word n-grams overlap (Jaccard) by at least `threshold`.

    MinHash signatures, candidates by banding (Broder 1997; Leskovec et al., Mining of Massive Datasets, 3.4), candidates compared exactly.

    Args:
        texts: in the order in which they are preferred.
        threshold: share of common n-grams, 0..1.
        size: words of an n-gram.
        hashes: length of a signature.
        seed: of the hash functions.
    """
    draw = np.random.default_rng(seed)
    a, b = draw.integers(1, _PRIME, (2, hashes, 1), dtype=np.uint64)
    rows = max(1, min((r for r in range(1, hashes + 1) if hashes % r == 0), key=lambda r: abs((r / hashes) ** (1 / r) - threshold + 0.1)))
    seen: list[str] = []
    grams = functools.lru_cache(maxsize=64)(lambda number: ngrams(words_of(seen[number]), size))  # all at once are 20 times the texts
    buckets: dict[int, tuple[int, ...]] = {}  # hashes that fall together only add a candidate, which is compared anyhow
    keep: list[bool] = []
    for number, text in enumerate(texts):
        seen.append(text)
        keep.append(True)
        if not (found := grams(number)):
            continue
        ids = np.array([int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=4).digest(), "little") for gram in found], np.uint64)
        signature = ((a * (ids % _PRIME) + b) % _PRIME).min(axis=1)
        keys = [hash((band, signature[band : band + rows].tobytes())) for band in range(0, hashes, rows)]
        candidates = {other for key in keys for other in buckets.get(key, ())}
        keep[number] = not any(len(found & grams(other)) >= threshold * len(found | grams(other)) for other in candidates)
        if keep[number]:
            for key in keys:
                buckets[key] = buckets.get(key, ()) + (number,)
    return np.array(keep, bool)


def ngrams(words: Sequence[str], size: int) -> set[str]:
    """All runs of `size` words; of a shorter text the whole."""
    return {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))} if words else set()


def without_words(texts: Iterable[str], words: Iterable[str]) -> np.ndarray:
    """Keep texts in which none of the words or phrases stands, in any case, as whole words."""
    padded = lambda words: f" {' '.join(words)} "
    phrases = [padded(found) for word in words if (found := words_of(word))]
    return np.array([not any(phrase in text for phrase in phrases) for text in (padded(words_of(text)) for text in texts)], bool)


def mostly_ascii(texts: Iterable[str], most: float = 0.05) -> np.ndarray:
    """Keep texts of which at most this share of the characters is not ASCII: a rule of thumb for English."""
    return np.array([sum(ord(character) > 127 for character in text) <= most * max(1, len(text)) for text in texts], bool)


def not_in(texts: Iterable[str], benchmark: Iterable[str], size: int = 13) -> np.ndarray:
    """Keep texts that share no run of `size` words with a benchmark (arXiv 2005.14165, appendix C); its shorter texts count whole."""
    held = set().union(*(ngrams(words_of(text), size) for text in benchmark))
    by_length = defaultdict(set)
    for gram in held:
        by_length[gram.count(" ") + 1].add(gram)

    least = min(by_length, default=1)
    begins = {" ".join(gram.split(" ", least)[:least]) for gram in held}  # most texts share not even the beginning of a run

    def clean(text: str) -> bool:
        words = words_of(text)
        if begins.isdisjoint(ngrams(words, least)):
            return True
        return not any(ngrams(words, length) & some for length, some in by_length.items() if len(words) >= length)

    return np.array([clean(text) for text in texts], bool)


def pair_of(sample: Ranked, least: float = 0.0) -> Preference | None:
    """The best and the worst of scored answers; None where they do not differ by more than `least` or have no scores."""
    try:
        sample = best_first(sample)
    except Bad:
        return None
    if len(sample.scores) < 2 or (margin := sample.scores[0] - sample.scores[-1]) <= least:
        return None
    return Preference(sample.prompt, sample.completions[0], sample.completions[-1], margin, template=sample.template)


def statistics(samples: Iterable[Any]) -> dict[str, Any]:
    """How many samples of which kind there are, and the words that they ask and answer: least, median, 90 %, most, sum."""
    kinds, lengths = Counter(), defaultdict(list)
    for sample in samples:
        kinds[type(sample).__name__] += 1
        for side, text in zip(("asked", "answered"), texts_of(sample)):
            lengths[side].append(len(words_of(text)))
    marks = {"least": 0, "median": 0.5, "90 %": 0.9, "most": 1}
    spread = lambda found: {name: int(np.quantile(found, mark)) for name, mark in marks.items()} | {"sum": sum(found)}
    return {"samples": dict(kinds)} | {f"words {side}": spread(found) for side, found in lengths.items()}
