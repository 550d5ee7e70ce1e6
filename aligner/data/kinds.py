"""The kinds of samples that algorithms need, and how each becomes an example of a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from aligner.data import samples, templates, turns
from aligner.data.formatters import PROMPTS
from aligner.data.samples import Document, Preference, Ranked, Supervised, Triple, TwoSided, Unpaired
from aligner.data.together import Steps, encoder
from aligner.types import Model

ANSWERS = -1  # in a shape: the most answers that an example of the dataset has


class Kind(NamedTuple):
    """How the samples that an algorithm needs become examples.

    Attributes:
        takes: types of samples that will do, the best first.
        encode: (sample, model, config.data) -> Encoded, an `aligner.data.together.encoder`.
        values: columns of the batch that come with the examples: name -> shape of one example's; the batch has [B,G,*shape] float32.
        last: score the last token of each answer alone, as reward heads do.
        prompt: score the prompt's tokens too.
        mismatched: put another row's answer beside each row's own.
        names: what people call the answers, in their order.
    """

    takes: tuple[type, ...]
    encode: Callable[[Any, Model, Any], templates.Encoded]
    values: Mapping[str, tuple[int, ...]] = {}
    last: bool = False
    prompt: bool = False
    mismatched: bool = False
    names: tuple[str, ...] = ()


@encoder
def _supervised(sample: Any, model: Model, data: Any) -> Steps:
    sample = samples.as_supervised(sample)
    return (yield from turns.encode_supervised.steps(sample, model.assets, model.media, data.get("loss_on", "assistant")))


@encoder
def _document(sample: Any, model: Model, data: Any) -> Steps:
    return (yield from turns.encode_document.steps(samples.as_document(sample), model.assets))


@encoder
def _preference(sample: Any, model: Model, data: Any) -> Steps:
    return (yield from templates.encode_preference.steps(samples.as_preference(sample), model.assets, model.media))


@encoder
def _with_margin(sample: Any, model: Model, data: Any) -> Steps:
    pair = samples.as_preference(sample)
    if not math.isfinite(pair.margin):  # JSON and Parquet know NaN, of which every loss would be NaN
        raise samples.Bad("margin is not finite", repr(pair.margin))
    return (yield from templates.encode_preference.steps(pair, model.assets, model.media))


@encoder
def _ranked(sample: Any, model: Model, data: Any) -> Steps:
    sample = samples.as_ranked(sample)
    return (yield from templates.encode_answers.steps(sample.prompt, sample.completions, model.assets, model.media, sample.template))


@encoder
def _unpaired(sample: Any, model: Model, data: Any) -> Steps:
    sample = samples.as_unpaired(sample)
    encoded = yield from templates.encode_answers.steps(sample.prompt, (sample.completion,), model.assets, model.media, sample.template)
    return encoded._replace(values={"label": float(sample.label)})


@encoder
def _two_sided(sample: Any, model: Model, data: Any) -> Steps:
    return (yield from templates.encode_two_sided.steps(samples.as_two_sided(sample), model.assets, model.media))


@encoder
def _triple(sample: Any, model: Model, data: Any) -> Steps:
    sample = samples.as_triple(sample)
    answers = (sample.pair.chosen, sample.pair.rejected, sample.gold)
    return (yield from templates.encode_answers.steps(sample.pair.prompt, answers, model.assets, model.media, sample.pair.template))


@encoder
def _cost(sample: Any, model: Model, data: Any) -> Steps:
    pair = samples.as_preference(sample)
    if 0 in pair.safe:
        raise samples.Bad("no safety label", "a cost model needs to know of both answers whether they are safe")
    return (yield from templates.encode_preference.steps(pair, model.assets, model.media))


@encoder
def _scored(sample: Any, model: Model, data: Any) -> Steps:
    sample = samples.as_scored(sample)
    encoded = yield from templates.encode_answers.steps(sample.prompt, sample.completions, model.assets, model.media, sample.template)
    return encoded._replace(values={"scores": sample.scores})


@encoder
def _prompt(sample: Any, model: Model, data: Any) -> Steps:
    sample = samples.as_prompt(sample)
    return (yield from templates.encode_prompt.steps(sample.prompt, model.assets, model.media, sample.template))


_PAIR = ("chosen", "rejected")
_AND_ANOTHER = ("answer", "another row's answer, for the KL alone")
ENCODERS = {
    "supervised": Kind((Supervised, Document, Preference, Ranked), _supervised),  # R=1
    "text": Kind((Document,), _document),  # R=1; cut into full rows
    "preference": Kind((Preference, Ranked), _preference, names=_PAIR),  # R=2
    "preference_prompt": Kind((Preference, Ranked), _preference, prompt=True, names=_PAIR),  # R=2
    "preference_last": Kind((Preference, Ranked), _with_margin, {"margin": ()}, last=True, names=_PAIR),
    "cost_last": Kind((Preference,), _cost, {"safe": (2,)}, last=True, names=_PAIR),
    # R=2: the row's answer, another row's to the same prompt
    "unpaired": Kind((Unpaired, Preference, Ranked), _unpaired, {"label": ()}, mismatched=True, names=_AND_ANOTHER),
    "unpaired_alone": Kind((Unpaired, Preference, Ranked), _unpaired, {"label": ()}),  # R=1
    "two_sided": Kind((TwoSided,), _two_sided),  # R=4: chosen, rejected under a good principle, then under a bad one
    "triple": Kind((Triple,), _triple, names=(*_PAIR, "gold")),  # R=3
    "ranked": Kind((Ranked, Preference), _ranked),  # as many as the longest list has; shorter ones lack the last
    "ranked_last": Kind((Ranked, Preference), _ranked, last=True),
    "prompt": Kind(PROMPTS, _prompt),  # R=0: what is answered in training
    "scored_last": Kind((Ranked,), _scored, {"scores": (ANSWERS,)}, last=True),
}
