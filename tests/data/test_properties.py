"""Whatever rows come: none crashes the pipeline, none is lost unseen, and the counts add up."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aligner.data.formatters import find_formatter, known
from aligner.data.kinds import ENCODERS
from aligner.data.loader import load_dataset
from aligner.data.samples import Bad
from aligner.types import UserError
from tests.data import tiny

MODELS = [tiny.text_model(), tiny.text_model(tiny.CHATML.replace("{{ eos_token }}", "{% generation %}{{ eos_token }}{% endgeneration %}"))]
KINDS = list(ENCODERS)
DATA = {"loss_on": "assistant"}

plain = st.sampled_from(["a cat", "two dogs", "no, it is late", "so it is", "🐈"])
odd = st.text(max_size=12) | st.sampled_from(["", " ", "\n\n", "<image>", "</s>", "{{ x }}", "\ud800", "\x00"])
words = st.integers(0, 4).flatmap(lambda n: plain if n < 4 else odd)  # small numbers are drawn more often
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "from", "value", "add_generation_prompt"]), inner),
    max_leaves=6,
)
contents = words | st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": words}), max_size=2)
messages = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", "human"]), "content": contents})
asked = st.tuples(words, words).map(lambda said: [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said)])
talks = st.lists(messages, max_size=5) | asked
turns = st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": words | st.lists(words)}), max_size=5)
texts = words | talks
rows = st.one_of(
    st.fixed_dictionaries({"messages": talks}),
    st.fixed_dictionaries({"conversations": turns}),
    st.fixed_dictionaries({"conversations": turns, "chosen": messages, "rejected": messages}),
    st.fixed_dictionaries({"prompt": texts, "completion": texts}),
    st.fixed_dictionaries({"prompt": texts, "completion": texts, "label": st.booleans() | st.none()}),
    st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts}),
    st.fixed_dictionaries({"chosen": texts, "rejected": texts}),
    st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts, "reference": texts}),
    st.fixed_dictionaries({"p_system": words, "n_system": words, "chosen": talks, "rejected": talks, "raw": talks}),
    st.fixed_dictionaries({"prompt": texts, "completions": st.lists(words, max_size=3), "scores": st.lists(st.floats(), max_size=3)}),
    st.fixed_dictionaries({"prompt": words, "response_0": words, "response_1": words, "better_response_id": st.integers(-1, 2)}),
    st.fixed_dictionaries({"instruction": words, "input": words, "output": words}),
    st.fixed_dictionaries({"text": words}),
)
pair = {"prompt": plain, "chosen": plain, "rejected": plain}
whole = st.one_of(  # what the demanding kinds take; of the rows above few would do
    st.fixed_dictionaries(pair),
    st.fixed_dictionaries(pair | {"reference": plain}),
    st.fixed_dictionaries({"prompt": plain, "completion": plain, "label": st.booleans()}),
    st.fixed_dictionaries({"prompt": plain, "completions": st.permutations(["a cat", "two dogs", "so it is"]), "scores": st.just([1.0, 0.0, -1.0])}),
)
tools = st.fixed_dictionaries({}, optional={"tools": values, "chat_template_kwargs": values, "system": values, "images": values})


@st.composite
def damaged(draw):
    """A row of some dataset, whole, with more columns, with one missing, or with anything in one."""
    row = draw(rows | whole)
    damage = draw(st.sampled_from(["none", "none", "more", "missing", "anything"]))
    if damage == "more":
        row |= draw(tools)
    column = draw(st.sampled_from(sorted(row)))
    if damage == "missing":
        del row[column]
    if damage == "anything":
        row[column] = draw(values)
    return row


EXAMPLES = Counter()
QUICK = settings(max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
THOROUGH = settings(QUICK, max_examples=1000, derandomize=False)


ABLE = {
    needs: [(name, variant.needs) for name, variants in known().items() for variant in variants if variant.makes in kind.takes]
    for needs, kind in ENCODERS.items()
}


def becomes_an_example_or_a_reason(row, model, kind, formatter):
    fitting = {needs: found for needs, able in ABLE.items() if (found := [name for name, columns in able if set(columns) <= set(row)])}
    fitting = fitting or {needs: [name for name, _ in able] for needs, able in ABLE.items()}
    needs = sorted(fitting)[kind % len(fitting)]
    kind, name = ENCODERS[needs], fitting[needs][formatter % len(fitting[needs])]
    needed = [column for variant in known()[name] for column in variant.needs]
    to_sample = find_formatter(name, [*row, *needed], "data.train", kind.takes)[1]
    try:
        encoded = kind.encode(to_sample(row), model, DATA)
    except Bad as bad:
        assert bad.reason and len(bad.reason) < 60
        return
    EXAMPLES[needs] += 1
    assert bool(encoded.answers) == (needs != "prompt") and all(len(answer) for answer in encoded.answers)
    assert encoded.scored is None or any(mask.any() for mask in encoded.scored), "something is learned"
    vocabulary = len(model.assets.tokenizer)
    assert all((part >= 0).all() and (part < vocabulary).all() for part in (encoded.prompt, *encoded.answers))


numbers = st.sampled_from(range(840))  # evenly, where `integers` prefers the small ones
ROW = dict(row=damaged(), model=st.sampled_from(MODELS), kind=numbers, formatter=numbers)
ROWS = dict(some=st.lists(damaged(), min_size=1, max_size=20), needs=st.sampled_from(KINDS))
test_a_row_becomes_an_example_or_a_reason = QUICK(given(**ROW)(becomes_an_example_or_a_reason))


@pytest.mark.slow
def test_a_thousand_rows():
    """Many become examples, of most kinds, so this is not about refusals alone."""
    EXAMPLES.clear()
    THOROUGH(given(**ROW)(becomes_an_example_or_a_reason))()
    assert sum(EXAMPLES.values()) > 100 and len(EXAMPLES) >= 8, EXAMPLES


@settings(QUICK, max_examples=15)
@given(**ROWS)
def test_counts_add_up(some, needs, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    try:
        dataset = load_dataset(tiny.config(path, max_length=64), "train", MODELS[0], needs, progress=False)
    except UserError as error:
        assert "rows" in str(error) or "row" in str(error)
        return
    assert len(dataset.row_ids) + sum(count for count, _ in dataset.dropped.values()) == dataset.rows_total
    seen = np.concatenate([dataset.row(i)["example_id"] for i in range(dataset.size)])
    assert set(seen[seen >= 0].tolist()) == set(dataset.row_ids.tolist())
