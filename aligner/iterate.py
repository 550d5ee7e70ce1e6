"""Rounds of generate, judge, train: iterative DPO by a reward model, or self-play against a dataset's own answers (SPIN).

    python -m aligner.iterate --config configs/dpo_llama3.py --workdir runs/rounds --rounds 3 --prompts prompts.jsonl \\
        --reward_model RM --n 8
    python -m aligner.iterate --config configs/dpo_llama3.py --workdir runs/spin --rounds 3 --prompts messages.jsonl --spin

Round r writes WORKDIR/round-r/pairs.jsonl with the model of the round before, whose weights are the reference too, and trains in
WORKDIR/round-r/train as the config says. By a reward model the best and the worst of n answers are a pair; in SPIN (arXiv 2401.01335) the
dataset's answer is preferred to the model's. The same command again goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from aligner.stopping import end_quietly, nothing_to_save

if __name__ == "__main__":  # first of all, as in aligner.main
    end_quietly()

from absl import flags
from ml_collections import ConfigDict

from aligner import arrays, workdir
from aligner.commandline import defaults
from aligner.main import CONFIG, WORKDIR, cli, start_jax
from aligner.types import UserError

FLAGS = flags.FLAGS
ASKED = "asked.json"  # in the workdir: what its rounds were made with, the config aside


def define_flags() -> None:
    """The command line beside --config and --workdir."""
    flags.DEFINE_integer("rounds", 3, "How many.")
    flags.DEFINE_string("prompts", None, "Dataset with the prompts; for --spin with the answers too.")
    flags.DEFINE_string("reward_model", "", "Judges the answers.")
    flags.DEFINE_bool("spin", False, "Prefer the dataset's answers to the model's own.")
    flags.DEFINE_integer("n", 4, "Answers to each prompt.")
    flags.DEFINE_integer("max_new_tokens", 256, "Tokens of an answer.")
    flags.DEFINE_float("temperature", 1.0, "Of the answers.")


def run(config: ConfigDict, directory: Path, rounds: int, prompts: str, reward_model: str, spin: bool, n: int, **options: Any) -> Path:
    """All rounds.

    Args:
        config: of the training of a round; its model.path is where the first starts from.
        directory: of all.
        prompts: dataset.
        reward_model, spin: who judges, one of the two.
        n: answers to each prompt; 1 with `spin`.
        options: further options of `aligner.generate`, by name.

    Returns:
        The folder of the last round's model.
    """
    from aligner.run import call_setup
    from aligner.run import run as train

    if bool(reward_model) == spin:
        raise UserError("give either --reward_model, which judges the answers, or --spin, which prefers the dataset's own")
    check(config, rounds)
    unresolved, config = config, workdir.resolve(config, directory)
    asked = {"prompts": prompts, "reward_model": reward_model, "spin": spin, "n": n, **options}
    asked.pop("dtype", None)  # the config's
    check_place(directory, asked)
    if config.setup:
        call_setup(config)
    # pairs stand in a folder of the round, what their prompts show where the prompts stand
    beside = Path(prompts).absolute()
    media = config.data.train.image_folder or (str(beside if beside.is_dir() else beside.parent) if beside.exists() else "")
    options |= {"image_folder": media} if media else {}
    options |= {"revision": config.model.revision} if config.model.revision else {}
    folder = config.model.path
    for number in range(rounds):
        place = directory / f"round-{number}"
        pairs, export = place / "pairs.jsonl", place / "train" / "export"
        this = of_round(unresolved, number, media)
        if export.exists():
            workdir.check(workdir.resolve(this, place / "train"), place / "train")  # whether it is a round of this config
        else:
            if not pairs.exists() or not pairs.stat().st_size:
                write_pairs(pairs, folder, prompts, reward_model, 1 if spin else n, options | template(folder, config))
            note_place(directory, asked)  # only now, so that a first try with a bad path leaves nothing behind
            train(this, place / "train")
        folder = export
    return Path(folder)


def of_round(config: ConfigDict, number: int, media: str) -> ConfigDict:
    """The config of one round's training, which learns from its pairs where the round before ended.

    What stands in the workdir of all rounds is named by its way from the round's own, "{workdir}", and so is known again where they were
    moved to another folder.
    """
    this = workdir.resolve(config, "{workdir}/../..").unlock()
    if number:
        this.model.path = f"{{workdir}}/../../round-{number - 1}/train/export"
    this.data.train.path = "{workdir}/../pairs.jsonl"
    this.data.train.formatter = "trl"
    this.data.train.image_folder = this.data.train.image_folder or media
    this.seed = config.seed + number
    this.setup = ""  # not again in every round
    this.checkpoint.export = True
    return this.lock()


def check(config: ConfigDict, rounds: int) -> None:
    """What is wrong whatever the data are."""
    import jax

    from aligner.algorithms import ONLINE

    if jax.process_count() > 1:
        raise UserError("rounds are made in one process, which writes the answers; its devices may be many")
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}; it must be at least 1")
    if config.lora.adapter:
        raise UserError(
            f"config.lora.adapter is {config.lora.adapter}, but a round starts from a whole model, with new adapters: the answers would be "
            "written without it, and every round would add it again; merge it into config.model.path first (merge_and_unload of PEFT)"
        )
    if config.algorithm.name in ONLINE:
        raise UserError(f"{config.algorithm.name} writes its own answers; a round learns from pairs, as configs/dpo_llama3.py does")


def check_place(directory: Path, asked: dict[str, Any]) -> None:
    """Whether the rounds in a folder, which are not made again, are those that are asked for."""
    path = directory / ASKED
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else asked
    pairs = {name: (before.get(name), value) for name, value in asked.items()}
    if changed := [f"--{name} was {pair[0]!r} and is {pair[1]!r}" for name, pair in pairs.items() if not workdir.same(*pair, directory)]:
        raise UserError(f"{directory} holds rounds of another command: {'; '.join(changed)}. Use another --workdir, or what was asked then")


def note_place(directory: Path, asked: dict[str, Any]) -> None:
    """What the rounds in a folder are made with."""
    workdir.write_json(directory / ASKED, asked)


def template(model: Any, config: ConfigDict) -> dict[str, str]:
    """The chat template that the config asks for with this model, and what it is told, as options of `aligner.generate`."""
    from aligner import convert
    from aligner.data.catalogue import with_template

    told = {"template": config.data.train.template.to_json()} if config.data.train.template else {}
    if not (config.data.chat_template or config.data.default_template):
        return told
    found = with_template(convert.open_model(model, config.model.revision)[0], config.data).assets.chat_template
    return told | ({"chat_template": found} if found else {})


def write_pairs(path: Path, model: Any, prompts: str, reward_model: str, n: int, options: dict[str, Any]) -> None:
    """A round's pairs: of the model's answers by a reward model, or the dataset's answer and the model's."""
    from aligner import by_row, generate
    from aligner.data import formatters, sources
    from aligner.data.samples import Supervised

    arguments = {"model": model, "data": prompts, "n": n, **options}
    arguments |= {"reward-model": reward_model, "write": "preference"} if reward_model else {}
    out = path if reward_model else path.with_name("answers.jsonl")
    command = [part for name, value in {**arguments, "out": out}.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    args = generate.parser().parse_args(command)
    if not out.exists():
        generate.run(args)
    if reward_model:
        if not out.stat().st_size:
            out.unlink()  # so that the same command writes them anew
            raise UserError(f"{reward_model} finds no answer to any of {prompts} better than another, so there is no pair to learn from")
        return
    rows = sources.open_rows(by_row.source(args), "data")
    _, to_sample = formatters.find_formatter("auto", rows.columns(), "data", (Supervised,))
    pairs = (spin_pair(to_sample, rows[number], record) for number, record in enumerate(by_row.records(out)))
    lines = [pair for pair in pairs if pair]
    if not lines:
        raise UserError(f"{prompts} holds no answers for --spin to prefer; give conversations that end with the assistant's message")
    with arrays.whole(path) as part:
        part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def spin_pair(to_sample: Any, row: dict[str, Any], record: dict[str, Any]) -> dict[str, Any] | None:
    """The answer of a dataset's row and the model's (a line of `aligner.generate`); None where one is missing or both are the same."""
    from aligner import by_row
    from aligner.data.conversations import answer_to, assistant
    from aligner.data.samples import Bad, as_supervised, is_conversation

    try:
        text = as_supervised(to_sample(row)).conversation
    except Bad:
        return None
    real = text if is_conversation(text) else [assistant(text)]
    real = real[1 + max((i for i, one in enumerate(real) if one["role"] != "assistant"), default=-1) :]  # with reasoning, calls, ..
    written, texts = record.get("completions", [None])[0], [one["content"] for one in real]
    if written is None or not real or not all(isinstance(text, str) for text in texts):
        return None
    if [text.strip() for text in texts] == [written.strip()]:
        return None
    prompt = record["prompt"]
    chosen = real if is_conversation(prompt) else texts[0]
    return {**by_row.prompt_columns(record), "prompt": prompt, "chosen": chosen, "rejected": answer_to(prompt, written)}


def main(argv: list[str]) -> int:
    for name in ("config", "workdir", "prompts"):
        if getattr(FLAGS, name) is None:
            raise UserError(f"--{name} is missing; see python -m aligner.iterate --helpshort")
    with nothing_to_save(CONFIG.value.checkpoint.requeue_code):  # while answers are written; training saves
        start_jax()
        config, directory = CONFIG.value, Path(WORKDIR.value)
        options = dict(max_new_tokens=FLAGS.max_new_tokens, temperature=FLAGS.temperature, dtype=config.model.dtype)
        with workdir.alone(directory):
            if rounds := sorted(directory.glob("round-*/train")):
                of_file = defaults(sys.argv)
                for before in rounds:
                    workdir.bring_up_to_date(before, of_file)
            folder = run(config, directory, FLAGS.rounds, FLAGS.prompts, FLAGS.reward_model, FLAGS.spin, FLAGS.n, **options)
    print(f"written: {folder}")
    return 0


if __name__ == "__main__":
    define_flags()
    cli(main)
