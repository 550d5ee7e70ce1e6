"""Demos for online training, from code alone: sums to be learnt from a verifier or a reward model, pictures whose colour is to be named.

The models are random and speak thirty-odd words; a right answer is found by chance about once in thirty tries, and kept by its reward.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from aligner.rl.environments import Step
from scripts.make_tiny_checkpoint import COLOURS, SHAPES, SPECIAL_TOKENS, VALUES, draw, make_llama, make_llava, new_folder, own

HIGHEST = 9  # summand
WORDS = (*SPECIAL_TOKENS, *map(str, range(2 * HIGHEST + 1)), "+", "=", "?", "colour", *COLOURS, *SHAPES)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ ' <image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
)


def make_words():
    """A tokenizer of whole words."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", chat_template=TEMPLATE,
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def question(a: int, b: int) -> list[dict]:
    return [{"role": "user", "content": f"{a} + {b} ="}]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_sums(folder: str | Path, seed: int = 0, scored: int = 20000) -> None:
    """train.jsonl with every sum of two numbers once, as a prompt with its answer; scored.jsonl with answers and how good they are.

    Args:
        folder: must not exist yet.
        seed: of which answers there are.
        scored: rows of scored.jsonl. Three fifths are a word alone, so many that every sum is seen with every word: what a reward model
            has not seen, a policy finds.
    """
    rng = np.random.default_rng([seed, 3])
    pairs = [(a, b) for a in range(HIGHEST + 1) for b in range(HIGHEST + 1)]
    with new_folder(folder) as folder:
        write_lines(folder / "train.jsonl", [{"prompt": question(a, b), "answer": str(a + b)} for a, b in pairs])
        rows = []
        for i in range(scored):
            a, b = pairs[rng.integers(len(pairs))]
            first, last, number = *rng.choice(WORDS[len(SPECIAL_TOKENS) :], 2), str(rng.integers(2 * HIGHEST + 1))
            near = str(np.clip(a + b + rng.choice([-3, -2, -1, 1, 2, 3]), 0, 2 * HIGHEST))
            last = (str(a + b), number, str(a + b), near, str(last))[i % 5]
            text = f"{first} {last}" if rng.random() < 0.4 else last
            rows.append({"prompt": question(a, b), "completion": text, "score": closeness(last, a + b)})
        write_lines(folder / "scored.jsonl", rows)


def closeness(word: str, total: int) -> float:
    """What an answer that ends with a word is worth to whoever marks it: 1 where it is the sum, a quarter less for each that it is off."""
    return max(0.0, 1 - abs(int(word) - total) / 4) if word.isdigit() else 0.0


def make_colours(folder: str | Path, rows: int = 512, seed: int = 0) -> None:
    """train.jsonl and heldout.jsonl: pictures of one coloured shape, each with the question for its colour and the answer."""
    rng = np.random.default_rng([seed, 4])
    with new_folder(folder) as folder:
        (folder / "pictures").mkdir()
        for split, count in (("train", rows), ("heldout", rows // 8)):
            lines = []
            for i in range(count):
                attributes = {name: str(rng.choice(values)) for name, values in VALUES.items()}
                name = f"pictures/{split}-{i:05d}.png"
                draw(attributes, rng, 32).save(folder / name)
                lines.append({"image": name, "prompt": [{"role": "user", "content": "<image> colour ?"}], "answer": attributes["colour"]})
            write_lines(folder / f"{split}.jsonl", lines)


def last_word(prompts: list, completions: list[str], *, ground_truth: list[str], **columns) -> list[float]:
    """A reward: 1 where an answer ends with the right word."""
    return [float(text.split()[-1:] == [truth]) for text, truth in zip(completions, ground_truth)]


def silent(prompts: list, completions: list[str], **columns) -> list[float]:
    """A reward: -1 where nothing is said, which no marked answer has taught a reward model to dislike."""
    return [0.0 if text.strip() else -1.0 for text in completions]


class AskAgain:
    """An environment of several turns: a sum is asked for again until it is right, and worth half as much every time.

    python -m aligner.main --config configs/grpo_llama3.py:tiny --workdir runs/turns \\
        --config.algorithm.environment=scripts.online_demo:AskAgain --config.algorithm.reward_funcs="()" --config.algorithm.max_turns=3
    """

    def reset(self, prompt, columns) -> None:
        self.truth, self.worth = str(columns["ground_truth"]), 1.0

    def step(self, text: str) -> Step:
        if text.split()[-1:] == [self.truth]:
            return Step(reward=self.worth, done=True)
        self.worth /= 2
        return Step("? =")


def setup_sums(config) -> None:
    """Make the model and the sums that a config names, where they are not there yet; and the reward model, where it names one."""
    model, data = Path(config.model.path), Path(config.data.train.path).parent
    if own(model) and not model.exists():
        make_llama(model, seed=config.seed, tokenizer=make_words(), hidden_size=64)
    if own(data) and not data.exists():
        make_sums(data, seed=config.seed)
    for name in config.algorithm.reward_funcs:
        if name.endswith("reward/export") and not Path(name).exists():
            steps = min(1500, 25 * config.train.steps)  # a run that is only a try need not wait for it
            train_reward_model(model, data / "scored.jsonl", Path(name).parent, steps)


def train_reward_model(model: Path, rows: Path, workdir: Path, steps: int) -> None:
    """A reward model that says how good an answer is, learnt from answers that are marked."""
    from aligner.run import run
    from configs import common

    config = common.base()
    config.algorithm = common.reward()
    config.algorithm.loss_type = "mse"
    config.algorithm.answers = 1
    config.model.path = str(model)
    config.model.dtype = "float32"
    config.data.train.path = str(rows)
    config.data.max_length = 32
    config.data.batch_size = 64
    config.data.pad_to_multiple = 8
    config.optim.learning_rate = 3e-3
    config.optim.schedule = "cosine"
    config.train.steps = steps
    config.checkpoint.export = True
    run(config.lock(), workdir)


def setup_colours(config) -> None:
    """Make the model and the pictures that a config names, where they are not there yet."""
    model, data = Path(config.model.path), Path(config.data.train.path).parent
    if own(model) and not model.exists():
        sizes = dict(hidden_size=64, vision_hidden_size=32, vision_layers=2)
        make_llava(model, seed=config.seed, tokenizer=make_words(), template=TEMPLATE, **sizes)
    if own(data) and not data.exists():
        make_colours(data, seed=config.seed)
