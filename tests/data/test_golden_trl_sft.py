"""Labels of supervised rows against TRL's own preprocessing."""

from tests.torch_required import torch  # isort: skip  # noqa: F401
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import trl
from datasets import Dataset

from aligner.data.formatters import find_formatter
from aligner.data.kinds import ENCODERS
from tests.data import tiny
from tests.data.test_turns import TALK, assistant, encode, mask, runs, tokens

TALKS = {
    "two turns": TALK,
    "one turn": TALK[:2],
    "system": [{"role": "system", "content": "Be brief."}, *TALK],
    "the user last": TALK[:3],
}


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "phi3", "gemma"])
def test_masks_equal_trl(name):
    """Templates with marks, as TRL patches them, and as they are released, without: the same tokens, the same mask."""
    from trl import SFTConfig, SFTTrainer  # seconds, where it stands above of every process that collects tests

    folder = Path(trl.__file__).parent / "chat_templates"
    released, marked = (tiny.text_model((folder / f"{name}{kind}.jinja").read_text()) for kind in ("", "_training"))
    args = SFTConfig(output_dir="unused", use_cpu=True, bf16=False, max_length=None, report_to="none", assistant_only_loss=True)
    tokenizer = marked.assets.tokenizer
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)
    for title, talk in TALKS.items():
        if name == "gemma" and title == "system":
            continue  # its template refuses one
        theirs = SFTTrainer._prepare_dataset(trainer, Dataset.from_list([{"messages": talk}]), tokenizer, args, False, None, "train")[0]
        for model in (marked, released):
            ours = encode(talk, model)
            assert tokens(ours).tolist() == theirs["input_ids"], title
            trained = mask(ours)
            if name == "qwen2_5" and model is released:  # TRL's marks stand before the line break that its generation prompt ends with
                trained |= np.append(np.diff(trained.astype(int)) == 1, False)
            assert np.where(trained, tokens(ours), -100).tolist() == theirs["labels"], (title, runs(ours, model))


PAIRS = {
    "conversation": {"prompt": TALK[:3], "completion": [assistant("a dog")]},
    "plain": {"prompt": "The sky is", "completion": " blue."},
    "merges over the boundary": {"prompt": "what is thi", "completion": "s house"},
    "text": {"text": "what is this picture of a cat"},
    "messages": {"messages": TALK},
}


@pytest.mark.parametrize("completion_only", [True, False])
def test_labels_of_prompts_and_texts_equal_trl(completion_only):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir="unused", use_cpu=True, bf16=False, max_length=None, report_to="none")
    for title, row in PAIRS.items():
        if completion_only and "messages" in row:
            continue
        model = tiny.text_model(bos=True)
        trainer = SimpleNamespace(_tokenizer=model.assets.tokenizer, chat_template=None, completion_only_loss=completion_only)
        theirs = SFTTrainer._prepare_dataset(trainer, Dataset.from_list([row]), model.assets.tokenizer, args, False, None, "train")[0]
        kind = ENCODERS["supervised"]
        _, to_sample = find_formatter("auto", list(row), "data.train", kind.takes)
        ours = kind.encode(to_sample(row), model, {"loss_on": "assistant" if completion_only else "all"})
        assert tokens(ours).tolist() == theirs["input_ids"], title
        expected = np.array(theirs["labels"])
        expected[0] = -100  # nothing predicts the first token; TRL's shift drops it
        assert np.where(mask(ours), tokens(ours), -100).tolist() == expected.tolist(), title
