"""Answer a dataset's prompts from the command line; keep the best of several by a reward model; make training rows of them.

    python -m aligner.generate --model DIR --data prompts.jsonl --out answers.jsonl
    python -m aligner.generate --model DIR --data prompts.jsonl --out best.jsonl --n 8 --reward-model RM --write best
    python -m aligner.generate --model DIR --data prompts.jsonl --out sft.jsonl --n 8 --reward-model RM --write sft --min-reward 0.5
    python -m aligner.generate --model DIR --data prompts.jsonl --out pairs.jsonl --n 8 --reward-model RM --write preference

Prompts are ShareGPT conversations, messages, rows with a `prompt`, or plain text; an answer that stands there already is left out.
What --write makes of every row of the dataset:

    answers      the row itself, with `completions`, `completion_lengths`, `stopped`, and `rewards` where there is a reward model;
                 a row that cannot be answered has `not_answered`, why
    best         the row itself, with `completion` and `reward` of its best answer (best of n)
    sft          `prompt`, `completion` of the best answer, if its reward is at least --min-reward (rejection sampling)
    preference   `prompt`, `chosen`, `rejected`: its best and worst answer, if their rewards differ by more than --min-margin

A killed run goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aligner import arrays, by_row
from aligner.types import UserError

WRITES = ("answers", "best", "sft", "preference")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser("python -m aligner.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = top.add_argument
    add("--model", required=True, help="checkpoint folder or Hub id")
    add("--write", choices=WRITES, default="answers", help="what becomes of a row (default: %(default)s)")
    add("--n", type=int, default=1, help="answers to each prompt (default: %(default)s)")
    add("--reward-model", default="", help="checkpoint folder or Hub id of a reward model that scores the answers")
    add("--min-reward", type=float, help="--write sft: rows whose best answer has less are left out")
    add("--min-margin", type=float, default=0.0, help="--write preference: the least difference of rewards (default: %(default)s)")
    add("--max-new-tokens", type=int, default=256, help="tokens of an answer (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: %(default)s)")
    add("--top-k", type=int, default=0, help="only the k likeliest tokens; 0 is off (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="only the fewest tokens of this probability together (default: %(default)s)")
    add("--min-p", type=float, default=0.0, help="only tokens so likely relative to the likeliest (default: %(default)s)")
    add("--repetition-penalty", type=float, default=1.0, help="divides logits of tokens that stand there (default: %(default)s)")
    add("--stop", action="append", default=[], help="text that ends an answer; may be given several times")
    add("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    add("--max-prompt-length", type=int, default=4096, help="longer prompts are not answered (default: %(default)s)")
    by_row.add_arguments(top, "answer", "texts written")
    return top


def run(args: argparse.Namespace) -> Path:
    """Answer a dataset.

    Args:
        args: as `parser` gives them.

    Returns:
        The file that was written.

    Raises:
        UserError: bad input, or a half-written file of another command stands in the way.
    """
    import jax

    from aligner import convert, sharding
    from aligner.console import bar, say
    from aligner.data import formatters, loader, sources
    from aligner.generation import engine as engines
    from aligner.generation import sampling
    from aligner.models import attention
    from aligner.rl.reward_model import make_reward_model

    out = Path(args.out)
    check(args)
    model, disk = by_row.open_model(args)
    if model.has_score_head:
        raise UserError(f"{args.model} has a score head, so it cannot write; score rows with python -m aligner.score")
    rows = sources.open_rows(by_row.source(args), "data")
    told = by_row.template_of(args)
    name, to_sample = formatters.find_formatter(args.formatter, rows.columns(), "data", formatters.PROMPTS, told)
    loader.check_assets(model)
    manner = sampling.Sampling(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
        repetition_penalty=args.repetition_penalty, stop_strings=tuple(args.stop), **sampling.of_checkpoint(model.assets),
    )  # fmt: skip
    partial = out.with_name(out.name + ".partial")
    free = ("out", "revision", "chat_template", "write", "min_reward", "min_margin", "batch_size", "fsdp", "size", "model", "data")
    settings = {key: value for key, value in vars(args).items() if key not in free}
    described = settings | by_row.inputs(model, disk, rows, name) | {"sampling": str(manner)}
    mesh = sharding.make_mesh({"data": -1, "fsdp": args.fsdp})
    width = -(-args.batch_size // mesh.size) * mesh.size
    with by_row.going_on(partial, described) as done, jax.set_mesh(mesh), attention.BACKEND(attention.chosen(mesh)):
        say(f"{rows.description}, formatter {name}: {len(rows)} rows" + (f", {done} of them done before" if done else ""))
        shardings = sharding.param_shardings(convert.abstract_params(model), model.sharding_rules, mesh)
        engine = engines.make_engine(model, manner, rows=width, dtype=args.dtype, detokenize=model.assets.tokenizer.decode)
        params = engine.prepare(convert.load_params(model, disk, args.dtype, shardings))
        seeing = dict(folder=rows.folder, frames=args.video_frames)
        reward = make_reward_model(args.reward_model, dtype=args.dtype, **seeing) if args.reward_model else None
        answer = lambda block: answer_rows(block, rows, to_sample, engine, params, reward, args)
        step = max(32, 4 * width // args.n)
        with bar(len(rows), "answering", "row", done) as progress, partial.open("a", encoding="utf-8") as file:
            for start in range(done, len(rows), step):
                for record in answer(range(start, min(start + step, len(rows)))):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    progress.update()
                file.flush()
        records = [*by_row.records(partial)]
        written = [line for record in records if (line := shape(record, args)) is not None]
        with arrays.whole(out) as part:
            part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in written), encoding="utf-8")
        partial.unlink()
        partial.with_suffix(".settings").unlink()
    failed = [record["not_answered"] for record in records if "not_answered" in record]
    say(*by_row.told(failed, len(records), "answered", f", {len(written)} lines written"))
    return out


def check(args: argparse.Namespace) -> None:
    """What can be known to be wrong from the command alone."""
    from aligner.generation import sampling

    by_row.check(args, ("n", "max_new_tokens", "max_prompt_length"))
    names = {field.name for field in dataclasses.fields(sampling.Sampling)} & vars(args).keys()
    sampling.check(sampling.Sampling(**{name: getattr(args, name) for name in names}), where="--")
    if "" in args.stop:
        raise UserError("--stop '' would end every answer at once; give a text that is not empty, or leave it out")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed is {args.seed}; it must be from 0 to 2^63 - 1")
    if args.write != "answers" and not args.reward_model:
        raise UserError(f"--write {args.write} needs --reward-model, which says which answer is the best")
    if args.write == "preference" and args.n < 2:
        raise UserError("--write preference needs --n of at least 2: a pair is the best and the worst answer")
    if args.n > 1 and args.temperature == 0:
        raise UserError(f"--n {args.n} with --temperature 0 would write the same answer {args.n} times")


def answer_rows(block: range, rows: Any, to_sample: Any, engine: Any, params: Any, reward: Any, args: argparse.Namespace) -> Iterator[dict]:
    """A record for every row of the block, in its order: the row, its prompt, its answers and what they are worth."""
    import jax

    from aligner.data import modalities, templates
    from aligner.data.samples import Bad, as_prompt
    from aligner.generation.engine import Prompt, generate_all

    model, found, prompts, options = modalities.looking_in(engine.model, rows.folder, args.video_frames), {}, {}, {}
    for i in block:
        try:
            sample = as_prompt(to_sample(rows[i]))
            prompts[i], options[i] = sample.prompt, sample.template
            encoded = templates.encode_prompt(sample.prompt, model.assets, model.media, sample.template)
            if len(encoded.prompt) > args.max_prompt_length:
                raise Bad("too long", f"{len(encoded.prompt)} tokens, --max-prompt-length is {args.max_prompt_length}")
            found[i] = Prompt(encoded.prompt, modalities.load(encoded.media, model))
        except Bad as bad:
            found[i] = str(bad)
    good = [i for i in block if isinstance(found[i], Prompt)]
    answers = generate_all(engine, params, [found[i] for i in good], jax.random.key(args.seed), args.n, ids=good)
    text = lambda tokens: model.assets.tokenizer.decode(tokens, skip_special_tokens=True)
    texts = [[text(answer.tokens) for answer in of_prompt] for of_prompt in answers]
    flat = [(prompts[i], text, options[i]) for i, of_prompt in zip(good, texts) for text in of_prompt]
    rewards = iter(reward(*zip(*flat))) if reward and flat else None
    answered = dict(zip(good, zip(texts, answers)))
    for i in block:
        record = by_row.json_able(rows[i]) | ({"prompt": plain(prompts[i])} if i in prompts else {})
        record.pop("not_answered", None)  # of an earlier time
        if i not in answered:
            yield {**record, "not_answered": found[i]}
            continue
        text, of_prompt = answered[i]
        record |= {
            "completions": text,
            "completion_lengths": [len(answer.tokens) for answer in of_prompt],
            "stopped": [answer.stopped for answer in of_prompt],
        }
        yield record | ({"rewards": [next(rewards) for _ in text]} if rewards else {})


def shape(record: dict[str, Any], args: argparse.Namespace) -> dict[str, Any] | None:
    """What --write makes of a row's record; None leaves the row out."""
    from aligner.data.conversations import answer_to

    if args.write == "answers":
        return record
    ranked = [(reward, text) for reward, text in zip(record.get("rewards", ()), record.get("completions", ())) if reward is not None]
    if not ranked:
        return None
    best, worst = max(ranked, key=lambda pair: pair[0]), min(ranked, key=lambda pair: pair[0])
    prompt = record["prompt"]
    kept = by_row.prompt_columns(record)
    if args.write == "best":
        rest = ("completions", "completion_lengths", "stopped", "rewards")
        return {key: value for key, value in record.items() if key not in rest} | {"completion": best[1], "reward": best[0]}
    if args.write == "sft":
        good = args.min_reward is None or best[0] >= args.min_reward
        return {**kept, "prompt": prompt, "completion": answer_to(prompt, best[1])} if good else None
    if best[0] - worst[0] <= args.min_margin or best[1] == worst[1]:
        return None
    chosen, rejected = (answer_to(prompt, text) for _, text in (best, worst))
    return {**kept, "prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": best[0] - worst[0]}


def plain(prompt: Any) -> Any:
    """A prompt as rows hold it: pictures and videos are marked where they stand, the row's own `image`, `videos`, .. say which."""
    from aligner.data.samples import is_conversation, parts_of

    text = lambda content: "".join(part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in parts_of(content))
    if prompt is None or isinstance(prompt, str):
        return prompt
    if is_conversation(prompt):
        return [{**message, "content": text(message["content"])} for message in prompt]
    return text(prompt)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    return by_row.main(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
