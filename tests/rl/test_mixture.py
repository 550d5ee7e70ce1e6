"""The mixture of two sets of parameters writes what its logits, made by hand, say."""

import jax
import numpy as np
import pytest

from aligner.data.layout import pair_row
from aligner.data.templates import Encoded
from aligner.generation.engine import generate_all, make_engine
from aligner.generation.sampling import Sampling
from aligner.logprobs import dense_logits
from aligner.models import from_hf
from aligner.models.pictures import fill
from aligner.rl.mixture import geometric
from aligner.types import UserError
from tests.generation.test_engine import pictures_of, prompts_of
from tests.models import tiny

SHARE = 0.3


@pytest.mark.parametrize("name", ["llama", pytest.param("llava", marks=pytest.mark.slow)])
def test_writes_by_the_weighted_sum_of_logits(name):
    f = tiny.family(name)
    other = tiny.perturbed(f.model, seed=7)
    mixed = geometric(f.model, SHARE)
    engine = make_engine(mixed, Sampling(max_new_tokens=5, temperature=1.0, stop_tokens=(2,)), rows=4)
    found = generate_all(engine, engine.prepare({"policy": f.params, "reference": other}), prompts_of(f)[:3], jax.random.key(1), n=2)
    images = max(len(pair.media) for pair in f.pairs)
    rows = []
    for pair, answers in zip(f.pairs, found):
        rows.append(pair_row(Encoded(pair.prompt, tuple(answer.tokens for answer in answers), pair.media), 64, 10, images, f.model.media))
        if pair.media:
            fill(rows[-1], pictures_of(f, pair), f.model.media)
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def logits(params):
        hidden = f.model.apply(params, batch, features=f.model.encode(params, batch)).hidden
        return dense_logits(hidden, f.model.head(params))

    policy, reference = (np.asarray(tiny.quick(logits)(tiny.as_arrays(params)), np.float64) for params in (f.params, other))
    total = (1 - SHARE) * policy + SHARE * reference
    logps = total - np.log(np.exp(total - total.max(-1, keepdims=True)).sum(-1, keepdims=True)) - total.max(-1, keepdims=True)
    for row, of_row, answers in zip(range(3), logps, found):
        written = np.concatenate([answer.logps for answer in answers])
        places = batch["score_from"][row, : len(written)], batch["score_token"][row, : len(written)]
        np.testing.assert_allclose(of_row[places], written, atol=1e-4)


def test_a_cap_on_the_logits_is_refused():
    from transformers import Gemma2Config

    config = Gemma2Config(vocab_size=62, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=4, final_logit_softcapping=30.0)  # fmt: skip
    model = from_hf(config)
    params = tiny.perturbed(model)
    with pytest.raises(UserError, match="cap their logits"):
        geometric(model, SHARE).head({"policy": params, "reference": params})
