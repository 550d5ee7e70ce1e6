"""Rounds of generate, judge, train on a tiny model."""

import json

import pytest

from aligner import iterate
from aligner.data.by_columns import messages, prompt_completion
from aligner.types import UserError
from configs import common
from scripts.make_tiny_checkpoint import make_llama
from scripts.online_demo import make_words, question


def test_self_play_prefers_the_datasets_answer():
    row = {"messages": [*question(1, 2), {"role": "assistant", "content": "3"}]}
    record = {**row, "prompt": question(1, 2), "completions": ["5"]}
    pair = iterate.spin_pair(messages, row, record)
    assert pair["chosen"] == [{"role": "assistant", "content": "3"}] and pair["rejected"] == [{"role": "assistant", "content": "5"}]
    assert iterate.spin_pair(messages, row, {**record, "completions": ["3"]}) is None, "nothing to prefer"
    assert iterate.spin_pair(messages, row, {"prompt": "x", "not_answered": "too long"}) is None
    plain = {"prompt": "1 + 2 =", "completion": " 3"}
    found = iterate.spin_pair(prompt_completion, plain, {**plain, "completions": [" 5"]})
    assert found == {"prompt": "1 + 2 =", "chosen": " 3", "rejected": " 5"}


def test_one_judge_it_must_be(tmp_path):
    with pytest.raises(UserError, match="either --reward_model"):
        iterate.run(common.base(), tmp_path, 1, "x", "", False, 2)


@pytest.mark.slow
def test_two_rounds_of_self_play(tmp_path):
    make_llama(tmp_path / "model", tokenizer=make_words(), hidden_size=32, layers=1, heads=2, kv_heads=1)
    rows = [{"messages": [*question(a, b), {"role": "assistant", "content": str(a + b)}]} for a in range(6) for b in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = common.base()
    config.model.path = str(tmp_path / "model")
    config.model.dtype = "float32"
    config.data.max_length = 32
    config.data.pad_to_multiple = 8
    config.data.batch_size = 8
    config.train.steps = 2
    options = dict(max_new_tokens=4, temperature=1.0, dtype="float32")
    folder = iterate.run(config, tmp_path / "spin", 2, str(tmp_path / "rows.jsonl"), "", True, 1, **options)
    assert folder == tmp_path / "spin" / "round-1" / "train" / "export" and (folder / "config.json").exists()
    pairs = [json.loads(line) for line in (tmp_path / "spin" / "round-1" / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) > 20 and all(pair["chosen"] != pair["rejected"] for pair in pairs)
