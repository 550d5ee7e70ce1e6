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
    """A text as tokens: ids int32 [n]; the tokenizer's own encoding, which knows where they stand, if that was asked for."""

    ids: np.ndarray
    encoding: Any = None

    @property
    def spans(self) -> np.ndarray:
        """int64 [n,2]: the characters from .. to of each token."""
        return np.fromiter(itertools.chain.from_iterable(self.encoding.offsets), np.int64, 2 * len(self.ids)).reshape(-1, 2)

    def over(self, start: int, end: int) -> slice:
        """The tokens that hold any of the characters start .. end; asked of the tokenizer, which is much faster than to list all spans."""
        at = self.encoding.char_to_token
        first = next((token for place in range(start, end) if (token := at(place)) is not None), 0)
        last = next((token for place in range(end - 1, start - 1, -1) if (token := at(place)) is not None), -1)
        while 0 <= last < len(self.ids) - 1 and (span := self.encoding.token_to_chars(last + 1)) and span[0] < min(end, span[1]):
            last += 1  # a character may take several tokens
        return slice(first, last + 1)


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
    asked: dict[int, Texts] = {}

    def go_on(number: int, found: list[Tokens] | None) -> None:
        try:
            asked[number] = running[number].send(found)
        except StopIteration as stop:
            ended[number] = stop.value
        except Bad as bad:
            ended[number] = bad

    for number in running:
        go_on(number, None)
    while asked:
        alike = collections.defaultdict(list)
        for number, texts in asked.items():
            alike[id(texts.tokenizer), texts.special, texts.spans].append((number, texts))
        asked.clear()
        for some in itertools.chain.from_iterable(map(_portions, alike.values())):
            made = iter(_tokens(some[0][1], [text for _, texts in some for text in texts.texts]))
            for number, texts in some:
                go_on(number, [*itertools.islice(made, len(texts.texts))])
    return [ended[number] for number in running]


def _portions(asked: list[tuple[int, Texts]]) -> Iterator[list[tuple[int, Texts]]]:
    """Of long texts few: what a tokenizer makes of a text takes about a hundred times its size until it is read."""
    edges = np.cumsum([sum(map(len, texts.texts)) for _, texts in asked]) // MOST_CHARACTERS
    for _, some in itertools.groupby(zip(edges.tolist(), asked), key=lambda pair: pair[0]):
        yield [pair for _, pair in some]


def _tokens(asked: Texts, texts: list[str]) -> list[Tokens]:
    """The tokens of all these texts, in the manner asked for."""
    tokenizer, _, special, spans = asked
    if not texts:
        return []
    ask = functools.partial(tokenizer, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    if spans:
        if not tokenizer.is_fast:
            raise UserError("the tokenizer cannot say where in the text its tokens stand; add tokenizer.json to the checkpoint folder.")
        return [Tokens(_ids(one.ids), one) for one in ask(texts).encodings]
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
