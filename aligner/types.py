"""The types that cross rooms: what a batch holds, what a model and an algorithm are. Data and functions, no behaviour.

Legend of shapes: B rows of a batch, T tokens of a row, S scored positions of a row, G examples (segments) of a row (1 unless
packed), R answers of an example (2 for a pair), I images of a row, P features of an image, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

# Nested dicts of arrays; our tree is Hugging Face's module tree (layers stacked on axis 0, kernels [in, out]).
Params = Mapping[str, Any]

# A batch is a plain dict of arrays, and every array leads with B, so that splitting rows splits everything:
#
#   tokens        [B,T] int32  token ids; a media placeholder keeps its id; padding is 0
#   positions     [B,T] int32  restart in every segment; each answer continues where its prompt ends
#   segment_ids   [B,T] int32  0 padding, else 1..; attention never crosses a segment
#   role          [B,T] int32  0 prompt, 1..R answers; a key is visible to a query if it is in the same segment, not later in the
#                              row, and its role is 0 or the query's
#   score_from    [B,S] int32  the column whose hidden state predicts the scored token
#   score_token   [B,S] int32  the scored token
#   score_segment [B,S] int32  0 padding (nothing is scored), else 1..G: which example of the row it belongs to
#   score_role    [B,S] int32  1..R: which answer of the example; 0 its prompt, where an algorithm learns that as well
#   example_id    [B,G] int32  the row of the dataset that the example came from; -1 where there is none
#   pixel_values  [B,I,H,W,3] float32   only for models that see (NHWC): whole images or their tiles; [B,I,...] patches of all images
#                                       one after another where a model takes them so; log-mel spectrograms [B,I,frames,bands] of sounds
#   image_mask    [B,I] bool            which of them are real
#   media_index   [B,T] int32           -1 for text, else i*P+p: the feature of the row that stands at this token
#   image_ids     [B,I] int32           of patches: which image of the row they are of, from 1; 0 padding
#   rope_positions [B,T,3] int32        positions in time, rows and columns, where a model turns by them (M-RoPE)
#   <array>       [B,I,...]             what else a family says of every slot (`Media.slot`)
#   <column>      [B,G,...]             what `prepare` computed per example, such as reference_logps [B,G,R]
#   read          [B,S] int32           the columns whose states are asked for, where not all are (`aligner.likelihood.read`)
#   alone         ()                    no array: there where every row is one text, which makes another program (`make_likelihood`)
Batch = Mapping[str, Array]


class Head(NamedTuple):
    """What turns a hidden state into logits: `softcap(scale * (h @ weight + bias))`."""

    weight: Float[Array, "D V"]  # [V, D] when `transposed` (tied to the embedding)
    transposed: bool = False
    bias: Float[Array, "V"] | None = None
    scale: float = 1.0
    softcap: float | None = None


class Output(NamedTuple):
    """What a model's `apply` returns; never logits."""

    hidden: Float[Array, "B T D"]  # after the final norm; [B,S,D] of the columns that the batch has as `read`
    aux: dict[str, Array]  # auxiliary losses by name, e.g. a router's
    cache: Any = None


class Scores(NamedTuple):
    """What a likelihood says of a batch; the objective sees nothing else of the model."""

    logps: Float[Array, "B G R"]  # summed over each answer's scored tokens
    lengths: Float[Array, "B G R"]  # number of scored tokens; 0 where there is no answer
    tokens: dict[str, Float[Array, "B S"]]  # TokenStats by name, 0 at padding
    aux: dict[str, Array]
    reference_logps: Float[Array, "B G R"] | None = None
    values: Float[Array, "B G R"] | None = None  # what a score head says of each answer; 0 where there is none


class Mean(NamedTuple):
    """A metric that is averaged: sums and counts are added over micro-batches and hosts, then divided."""

    sum: Float[Array, ""]
    count: Float[Array, ""]


class Max(NamedTuple):
    """A metric of which the largest value counts."""

    value: Float[Array, ""]


class Min(NamedTuple):
    """A metric of which the smallest value counts."""

    value: Float[Array, ""]


class Last(NamedTuple):
    """A metric of which the newest value counts."""

    value: Float[Array, ""]


class Term(NamedTuple):
    """One term of a loss: weight * sum / (count over the whole global batch). The count depends on masks alone."""

    weight: float
    sum: Float[Array, ""]
    count: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How a family's parameter tree and its Hugging Face names differ beyond the generic rule of `aligner.convert.tables`.

    Attributes:
        stacks: tree prefix -> Hugging Face prefix with `{i}`, where layers are stacked, e.g. {"model/layers": "model.layers.{i}"}.
        exceptions: table of (Hugging Face name pattern, tree path, operation) for leaves that the generic rule does not cover.
        renames: (regex, replacement) pairs that turn every older layout's names on disk into the layout we write.
        ignored: regexes of tensors on disk that carry no parameter (old buffers such as `rotary_emb.inv_freq`).
        modules: (regex, replacement) pairs that turn the layout we write into the names of `transformers`' modules in memory, which
            PEFT adapters go by.
        tied: (name, other) pairs: `name`, when it is stored, must equal `other` and is not a parameter of its own.
        fresh: names that need not be stored; `Model.init` then makes them.
    """

    stacks: Mapping[str, str]
    exceptions: Sequence[tuple] = ()
    renames: Sequence[tuple[str, str]] = ()
    ignored: Sequence[str] = ()
    modules: Sequence[tuple[str, str]] = ()
    tied: Sequence[tuple[str, str]] = ()
    fresh: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Media:
    """What the data side must know of the media a model takes; `None` on text models.

    A picture fills one or more slots of a row's `pixel_values` (itself; its tiles; its patches; a video's frames; a sound's spectrogram).
    `encode` gives P features for each slot, and every placeholder in the text stands for one of them. `aligner.models.pictures` has the
    types that the functions take and give.

    Attributes:
        placeholder: token id that stands for one feature of what is of `kind`.
        features: P, features of a slot.
        height, width: of a slot's pixels; frames and bands of a spectrogram.
        lead: features of a row that come before those of the slots, such as what ends a line of patches.
        slot: array name -> (shape, dtype) of what a slot holds besides, or instead of, `pixel_values` [height, width, 3].
        per_token: array name -> (shape, dtype) of what `arrange` says of every token.
        show: ((width, height) or, of a sound, (frames, bands), assets, number of pictures in the row) -> Shown; None where
            every picture fills one slot and takes P placeholders.
        pictures: what the processors of images, videos and sounds return -> a Picture for each; None where that is `pixel_values`
            [n,3,height,width].
        arrange: (row, its Pictures) -> arrays of the row by name; None where there are none.
        together: the image processor is told which pictures are of one row, since it treats several otherwise than one.
        kind: what `placeholder` stands for, one of `aligner.data.samples.MEDIA`.
        video: token id that stands for one feature of a video; None where a model takes none.
        show_clip: (Clip, assets) -> Shown.
        process_clip: (Clip with its frames, assets) -> what the checkpoint's video processor would return for it.
        folder: where files are looked up; the data side sets it.
        frames: how many frames are taken of a video; the data side sets it.
    """

    placeholder: int
    features: int
    height: int
    width: int
    lead: int = 0
    slot: Mapping[str, tuple[tuple[int, ...], Any]] = dataclasses.field(default_factory=dict, compare=False)
    per_token: Mapping[str, tuple[tuple[int, ...], Any]] = dataclasses.field(default_factory=dict, compare=False)
    show: Callable[..., Any] | None = dataclasses.field(default=None, compare=False)
    pictures: Callable[..., Any] | None = dataclasses.field(default=None, compare=False)
    arrange: Callable[..., Any] | None = dataclasses.field(default=None, compare=False)
    together: bool = False
    kind: str = "image"
    video: int | None = None
    show_clip: Callable[..., Any] | None = dataclasses.field(default=None, compare=False)
    process_clip: Callable[..., Any] | None = dataclasses.field(default=None, compare=False)
    folder: Any = dataclasses.field(default=None, compare=False)
    frames: int = dataclasses.field(default=8, compare=False)

    @property
    def tokens(self) -> dict[str, int]:
        """Each kind of media that the model takes, and the token that stands for one of its features."""
        return {self.kind: self.placeholder} | ({} if self.video is None else {"video": self.video})

    @property
    def sizes(self) -> tuple[Any, ...]:
        """What tells one model's media from another's."""
        return (self.placeholder, self.features, self.height, self.width, self.lead, *(() if self.video is None else (self.frames,)))


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as functions of parameters and data about it.

    Attributes:
        family: Hugging Face's `model_type`.
        config: the family's own frozen dataclass, read from the Hugging Face config.
        init: key -> params, float32, random as the family initialises.
        encode: (params, batch, key=None, remat="none") -> features [B, I*P, D], or None when the batch holds no media. `key` draws what
            adapters drop.
        apply: (params, batch, *, features=None, cache=None, key=None, remat="none") -> Output, at the columns that the batch has as `read`.
        head: params -> Head; of a model with a score head, weight [D, 1].
        inputs: what a Hugging Face processor returns (NumPy) -> Batch, for looking and testing.
        conversion: how the tree maps to Hugging Face names.
        sharding_rules: (regex on the tree path, logical axes) pairs; the first match wins.
        trained_layers: tree prefix -> how many of its stacked layers a gradient reaches (a tower's last ones may be unused).
        media: sizes that the data side needs, None for text models.
        assets: the checkpoint folder's companions (tokenizer, processor, ...), None for a model made from a bare config.
        source_dtype: dtype name of the weights on disk: what `save` writes unless told otherwise.
        has_score_head: the head gives one score, not logits over a vocabulary.
    """

    family: str
    config: Any
    init: Callable[..., Params]
    encode: Callable[..., Array | None]
    apply: Callable[..., Output]
    head: Callable[[Params], Head]
    inputs: Callable[[Mapping[str, Any]], Batch]
    conversion: Conversion
    sharding_rules: Sequence[tuple[str, tuple[str | None, ...]]]
    trained_layers: Mapping[str, int] = dataclasses.field(default_factory=dict)
    media: Media | None = None
    assets: Any = None
    source_dtype: str = "float32"
    has_score_head: bool = False

    def logits(self, params: Params, inputs: Mapping[str, Any]) -> Float[Array, "B T V"]:
        """Dense logits [B,T,V] of a Hugging Face processor's output, for looking and testing; training never makes them."""
        from aligner.logprobs import dense_logits  # the one module that may hold vocabulary-sized arrays

        batch = self.inputs(inputs)
        output = self.apply(params, batch, features=self.encode(params, batch))
        return dense_logits(output.hidden, self.head(params))


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """An algorithm as pure functions.

    Attributes:
        score: (params, fixed, batch, key) -> Scores: what the model says of the batch.
        objective: (scores, batch, carry) -> (terms, metrics, carry): the mathematics. Terms are {name: Term}, metrics
            {name: Mean | Max | Min | Last}.
        carry: initial value of what is kept from step to step (running moments, coefficients); checkpointed.
        held_out: the objective in evaluation, where it is another: there nothing moves on what training keeps.
        prepare: (params, batch) -> {column: [B,G,...]}: computed once per example before training and stored, or None.
        columns: names of the columns that `objective` reads.
        prepared_with: settings that those columns depend on beside the weights; part of the name under which they are kept.
        needs: the kind of sample that rows become, a key of `aligner.data.kinds.ENCODERS`.
        whole_batch: the objective is not a sum over rows (a sort, a batch mean inside a nonlinearity): under accumulation it is then
            evaluated on the scores of the whole batch, exactly.
        sync: (weight a, every N steps): the reference becomes a * policy + (1 - a) * reference; None keeps it fixed.
        rollout: (params, fixed, batch) -> {column: [B,S]}: what an online algorithm asks of the policy that wrote the answers, of its
            reference and of its critic, before it learns from them; None learns from a dataset.
        others: further frozen models, name -> (model, where its checkpoint is): `score` finds their parameters in `fixed`.
    """

    score: Callable[..., Scores]
    objective: Callable[..., tuple[dict[str, Term], dict[str, Any], Any]]
    carry: Any = dataclasses.field(default_factory=dict)
    held_out: Callable[..., tuple[dict[str, Term], dict[str, Any], Any]] | None = None
    prepare: Callable[..., dict[str, Array]] | None = None
    columns: tuple[str, ...] = ()
    prepared_with: Any = None
    needs: str = "preference"
    whole_batch: bool = False
    sync: tuple[float, int] | None = None
    rollout: Callable[..., dict[str, Array]] | None = None
    others: Mapping[str, tuple[Model, str]] = dataclasses.field(default_factory=dict)


class UserError(Exception):
    """Bad input. Its message is one sentence that names the thing, where it is and the nearest fix; no traceback is shown."""


class SaveError(UserError):
    """A checkpoint could not be written. Threads of Orbax may wait for minutes for one that failed: whoever tells of it ends at once."""


__all__ = ["Algorithm", "Array", "Batch", "Bool", "Conversion", "Float", "Head", "Int", "Last", "Max", "Mean", "Media", "Min", "Model",
           "Output", "Params", "SaveError", "Scores", "Term", "UserError"]  # fmt: skip
