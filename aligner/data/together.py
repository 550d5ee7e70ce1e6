"""Encoders of rows, run side by side: what all of them want tokenised goes to the tokenizer in one call, which uses every core.

An encoder is a generator. It yields the texts that it needs as tokens, is sent their tokens, and returns what it makes of them:

    @encoder
    def encode_title(row, tokenizer):
        [title] = yield Texts(tokenizer, [row["title"]])
        return title.ids

`encode_title(row, tokenizer)` is then an ordinary function of one row; `together([encode_title.steps(row, tokenizer) for row in rows])`
gives the same for many, and of an encoder another one is a part by `yield from encode_title.steps(row, tokenizer)`.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from aligner.data.samples import Bad
from aligner.types import UserError

MOST_CHARACTERS = 1 << 18  # in one call of the tokenizer, but for a text that is longer


class Texts(NamedTuple):
    """What an encoder asks for.

    Attributes:
        tokenizer: of Hugging Face.
        texts: each is tokenised as a whole.
        special: let the tokenizer add its special tokens.
        spans: tell where in the text each token stands; the tokenizer must be a fast one.
    """

    tokenizer: Any
    texts: Sequence[str]
    special: bool = True
    spans: bool = False


class Tokens(NamedTuple):
    """A text as tokens: ids int32 [n]; spans int64 [n,2], the characters from .. to, where they were asked for."""

    ids: np.ndarray
    spans: np.ndarray | None = None


Steps = Generator[Texts, list[Tokens], Any]


def encoder(steps: Callable[..., Steps]) -> Callable[..., Any]:
    """A generator function as an ordinary one, which raises Bad; the generator function itself is its `steps`."""

    @functools.wraps(steps)
    def encode(*args: Any, **options: Any) -> Any:
        [found] = together([steps(*args, **options)])
        if isinstance(found, Bad):
            raise found
        return found

    encode.steps = steps
    return encode


def together(encoders: Iterable[Steps]) -> list[Any]:
    """Run encoders until all have ended.

    Returns:
        What each returned, or the Bad that it raised, in their order.
    """
    running = dict(enumerate(encoders))
    ended: dict[int, Any] = {}
    tokens: dict[int, list[Tokens] | None] = dict.fromkeys(running)
    while tokens:
        asked = {}
        for number, found in tokens.items():
            try:
                asked[number] = running[number].send(found)
            except StopIteration as stop:
                ended[number] = stop.value
            except Bad as bad:
                ended[number] = bad
        tokens = _tokenise(asked)
    return [ended[number] for number in running]


def _tokenise(asked: dict[int, Texts]) -> dict[int, list[Tokens]]:
    """The tokens that each asked for, by few calls for all who want the same of the same tokenizer."""
    found: dict[int, list[Tokens]] = {number: [] for number in asked}
    wanted = collections.defaultdict(list)
    for number, (tokenizer, texts, *manner) in asked.items():
        wanted[id(tokenizer), *manner] += [(number, text) for text in texts]
    for (_, special, spans), pairs in wanted.items():
        for some in _portions(pairs):
            numbers, texts = zip(*some)
            tokens = _tokens(asked[numbers[0]].tokenizer, list(texts), special, spans)
            for number, one in zip(numbers, tokens):
                found[number].append(one)
    return found


def _portions(pairs: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Of long texts few: what a tokenizer makes of a text takes about a hundred times its size until it is converted."""
    edges = np.cumsum([len(text) for _, text in pairs]) // MOST_CHARACTERS
    for _, some in itertools.groupby(zip(edges.tolist(), pairs), key=lambda pair: pair[0]):
        yield [pair for _, pair in some]


def _tokens(tokenizer: Any, texts: list[str], special: bool, spans: bool) -> list[Tokens]:
    ask = functools.partial(tokenizer, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    if spans:
        if not tokenizer.is_fast:
            raise UserError("the tokenizer cannot say where in the text its tokens stand; add tokenizer.json to the checkpoint folder.")
        return [Tokens(_ids(one.ids), _spans(one.offsets)) for one in ask(texts).encodings]
    first = ask(texts[0])["input_ids"]
    if tokenizer.is_fast and len(texts) > 1:
        # To keep track of where tokens stand takes a quarter of the time, so its Rust half is asked without. Its Python half, which may
        # do more, is asked for the first text: it has the Rust half neither cut nor pad, and the two must agree.
        fast = [one.ids for one in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=special)]
        if fast[0] == first:
            return [Tokens(_ids(ids)) for ids in fast]
    return [Tokens(_ids(ids)) for ids in (first, *(ask(texts[1:])["input_ids"] if texts[1:] else ()))]


def _ids(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.int32)


def _spans(offsets: list[tuple[int, int]]) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2)
