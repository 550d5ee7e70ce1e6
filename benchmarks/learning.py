"""Every algorithm learns on real rows: a small random model, 100 steps each, through `aligner.run`.

    python -m benchmarks.learning --data ../shared/data --out runs/learning

The means of the first and of the last ten steps are compared: the loss must fall and the algorithm's own measures must rise. Prints a
table, draws the curves (OUT/curves.png), and ends with an error if one did not. What is there already is not run again; `--only NAME` runs
some. This shows that each algorithm learns its rows, not that it learns from them: the rows are few and nothing is held out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from tqdm import tqdm

from configs import common

STEPS, ENDS = 100, 10
VOCABULARY = 1024


class Run(NamedTuple):
    """One line of the table.

    Attributes:
        algorithm: makes config.algorithm.
        rows: name of a data set, see `make_rows`.
        rises: names in metrics.jsonl that must rise.
        settings: of config.algorithm.
        start: the run whose export this one starts from; "" is the random model.
    """

    algorithm: Callable[[], ConfigDict]
    rows: str
    rises: tuple[str, ...]
    settings: dict[str, Any]
    start: str = ""


REWARDS = ("rewards/margins", "rewards/accuracies")
MARGINS = ("rewards/margins",)  # of single answers: there is no pair to be right about
SCORES = ("margin", "accuracy")


def one(algorithm: Callable[[], ConfigDict], rows: str, *rises: str, **settings: Any) -> Run:
    return Run(algorithm, rows, rises, settings)


def dpo(*loss_type: str, rows: str = "hh_rlhf", **settings: Any) -> Run:
    return one(common.dpo, rows, *REWARDS, loss_type=loss_type, **settings)


RUNS = {
    "sft": one(common.sft, "dpo_en", "mean_token_accuracy"),
    # -p log p is least where nothing is likely: DFT is for a model that has learned something
    "sft, dft": one(common.sft, "dpo_en", "mean_token_accuracy", loss_type="dft")._replace(start="sft"),
    "cpt": one(common.cpt, "wiki", "mean_token_accuracy"),
    "distillation": one(common.distillation, "dpo_en", "agreement"),
    "reward": one(common.reward, "hh_rlhf", *SCORES, center_rewards_coefficient=0.01),
    "reward, plackett_luce": one(common.reward, "ranked", *SCORES, loss_type="plackett_luce", answers=3),
    "reward, mse": one(common.reward, "scored", *SCORES, loss_type="mse"),
    "cost": one(common.cost, "safe_rlhf", *SCORES, "accuracy_sign"),
    "dpo, sigmoid": dpo("sigmoid"),
    "dpo, hinge": dpo("hinge"),
    "dpo, ipo": dpo("ipo"),
    "dpo, ipo_sum": dpo("ipo_sum"),
    "dpo, exo_pair": dpo("exo_pair", label_smoothing=1e-3),
    "dpo, nca_pair": dpo("nca_pair"),
    "dpo, robust": dpo("robust", label_smoothing=0.1),
    "dpo, bco_pair": dpo("bco_pair"),
    "dpo, bco": dpo("bco"),
    "dpo, sppo_hard": dpo("sppo_hard"),
    "dpo, aot": dpo("aot"),
    "dpo, aot_unpaired": dpo("aot_unpaired"),
    "dpo, apo_zero": dpo("apo_zero"),
    "dpo, apo_down": dpo("apo_down"),
    "dpo, discopop": dpo("discopop"),
    "dpo, sigmoid_norm": dpo("sigmoid_norm", beta=1.0),
    "dpo, sigmoid + sft": dpo("sigmoid", "sft", loss_weights=(1.0, 0.5)),
    "dpo, WPO": dpo("sigmoid", use_weighting=True),
    "dpo, LD": dpo("sigmoid", ld_alpha=0.5),
    "dpo, js_divergence": dpo("sigmoid", f_divergence_type="js_divergence"),
    "dpo_ranked": one(common.dpo_ranked, "ranked", *REWARDS, answers=3),
    "kto": one(common.kto, "kto_en", *MARGINS),
    "kto, apo_zero_unpaired": one(common.kto, "kto_en", *MARGINS, loss_type="apo_zero_unpaired"),
    "kto, bco": one(common.kto, "kto_en", *MARGINS, loss_type="bco"),
    "orpo": one(common.orpo, "hh_rlhf", *REWARDS),
    "cpo": one(common.cpo, "hh_rlhf", *REWARDS),
    "simpo": one(common.simpo, "hh_rlhf", *REWARDS, beta=2.0),
    "alphapo": one(common.alphapo, "hh_rlhf", *REWARDS, beta=2.0),
    "tpo": one(common.tpo, "triples", *REWARDS, beta=0.1),
    "sso": one(common.sso, "two_sided", *REWARDS),
    "image: sft": one(common.sft, "scienceqa", "mean_token_accuracy"),
    "image: reward": one(common.reward, "scienceqa", *SCORES),
    "image: dpo": dpo("sigmoid", rows="scienceqa"),
    "image: kto": one(common.kto, "scienceqa", *MARGINS),
    "image: orpo": one(common.orpo, "scienceqa", *REWARDS),
    "image: simpo": one(common.simpo, "scienceqa", *REWARDS, beta=2.0),
}


def make_rows(data: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Name -> what config.data.train is set to. Files are taken as they are; where an algorithm asks for another form, rows are rewritten.
    """
    out.mkdir(parents=True, exist_ok=True)
    text, pictures = data / "text", data / "image" / "scienceqa"
    pairs = json.loads((text / "dpo_en_demo.json").read_text())
    pairs = [row for row in pairs if len(row["conversations"]) == 1 and len(json.dumps(row)) < 1800]
    prompt = lambda row: row["conversations"][0]["value"]
    answers = lambda row: [row["chosen"]["value"], row["rejected"]["value"]]
    says = lambda name, value: {"from": name, "value": value}

    def write(name: str, rows: list[dict]) -> dict[str, str]:
        path = out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return dict(path=str(path))

    # an answer to another prompt is the worst
    worst = [answers(other)[0][:300] for other in pairs[1:] + pairs[:1]]
    ranked = [{"conversations": [says("human", prompt(row)), says("gpt", [*answers(row), last])]} for row, last in zip(pairs, worst)]
    triples = [{"prompt": prompt(row), "reference": answers(row)[0], "chosen": answers(row)[1], "rejected": last}
               for row, last in zip(pairs, worst)]  # fmt: skip
    scored = [{"prompt": prompt(row), "completions": answers(row), "scores": [1.0, -1.0]} for row in pairs]
    turns = lambda row, answer: [says("human", prompt(row)), says("gpt", answer)]
    two_sided = [
        {"p_system": "Answer well.", "n_system": "Answer badly.", "chosen": turns(row, answers(row)[0]),
         "rejected": turns(row, answers(row)[1]), "raw": turns(row, answers(row)[1])}
        for row in pairs
    ]  # fmt: skip
    return {
        "hh_rlhf": dict(path=str(text / "hh_rlhf_harmless.jsonl"), size=300),
        "dpo_en": dict(path=str(text / "dpo_en_demo.json")),
        "kto_en": dict(path=str(text / "kto_en_demo.json")),
        "wiki": dict(path=str(text / "wiki_demo.txt"), sample_by="line", size=40),
        "safe_rlhf": dict(path=str(text / "pku_saferlhf_32.json"), formatter="safe_rlhf_cost"),
        "ranked": write("ranked", ranked),
        "triples": write("triples", triples),
        "scored": write("scored", scored),
        "two_sided": write("two_sided", two_sided),
        "scienceqa": write("scienceqa", [right_and_wrong(row) for row in json.loads((pictures / "questions.json").read_text())])
        | dict(image_folder=str(pictures / "images"), size=80),
    }


def right_and_wrong(row: dict) -> dict:
    """A question of ScienceQA whose options stand in its text, as a pair of options."""
    question = row["conversations"][0]["value"]
    options = dict(re.findall(r"^\(([A-Z])\) (.+?) *$", question, re.MULTILINE))
    wrong = next(letter for letter in options if letter != row["label"])
    answer = lambda letter: f"({letter}) {options[letter]}"
    return {"image": row["image"], "question": question, "chosen": answer(row["label"]), "rejected": answer(wrong)}


def make_models(data: Path, out: Path) -> None:
    """Small random models, and a tokenizer that has read the rows, so that they are not mostly bytes."""
    from scripts.make_tiny_checkpoint import LLAMA_TEMPLATE, LLAVA_TEMPLATE, make_llama, make_llava, make_tokenizer

    if out.exists():
        return
    files = [*sorted((data / "text").glob("*_demo.json*")), data / "image" / "scienceqa" / "questions.json"]
    texts = [path.read_text()[:200_000] for path in files]
    sizes = dict(vocab_size=VOCABULARY, hidden_size=64, layers=2, heads=2, kv_heads=2)
    make_llama(out / "llama", **sizes)
    make_llama(out / "teacher", seed=1, **sizes)
    make_llava(out / "llava", image_size=32, patch_size=16, vision_hidden_size=32, vision_layers=3, vision_heads=2, **sizes)
    tokenizer = make_tokenizer(VOCABULARY, texts)
    for name, template in (("llama", LLAMA_TEMPLATE), ("teacher", LLAMA_TEMPLATE), ("llava", LLAVA_TEMPLATE)):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(out / name)


def folder_of(name: str, out: Path) -> Path:
    return out / re.sub(r"\W+", "_", name)


def train(name: str, rows: dict[str, Any], out: Path, steps: int) -> None:
    """One run; what it tells goes to WORKDIR/log.txt."""
    from aligner.run import run as train_

    run, workdir, config = RUNS[name], folder_of(name, out), common.base()
    config.algorithm = run.algorithm()
    config.algorithm.update(run.settings)
    if config.algorithm.name == "distillation":
        config.algorithm.teacher = str(out / "models" / "teacher")
    start = folder_of(run.start, out) / "export" if run.start else out / "models" / ("llava" if "image_folder" in rows else "llama")
    config.model.path = str(start)
    config.model.dtype = "float32"
    config.reference.cache = str(out / "reference")
    config.data.train.update(rows)
    config.data.max_length = 160 if run.rows in ("hh_rlhf", "wiki", "scienceqa") else 256
    config.data.max_bad_fraction = 1.0  # many of these rows are longer
    config.data.pad_to_multiple = 32
    config.data.workers = 2
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "constant"
    config.train.steps = steps
    config.log.every = 1
    config.checkpoint.export = name in {other.start for other in RUNS.values()}
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "log.txt").open("a") as log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
        train_(config, workdir)
    shutil.rmtree(workdir / "checkpoints")


def ends(records: list[dict], name: str) -> tuple[float, float]:
    """Means over the first and the last steps; a batch without a bad answer, say, has no margin."""
    mean = lambda some: statistics.mean(record[name] for record in some if name in record)
    return mean(records[:ENDS]), mean(records[-ENDS:])


def read(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw(found: dict[str, list[dict]], path: Path) -> None:
    """Loss (blue) and the first of the measures that must rise (orange) of every run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 6
    lines = -(-len(found) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3 * columns, 2 * lines), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (name, records) in zip(axes.flat, found.items()):
        other = axis.twinx()
        for where, key, colour in ((axis, "loss", "tab:blue"), (other, RUNS[name].rises[0], "tab:orange")):
            where.plot(*zip(*((record["step"], record[key]) for record in records if key in record)), color=colour, linewidth=0.8)
        axis.set_title(f"{name} ({RUNS[name].rises[0]})", fontsize=8)
        for each in (axis, other):
            each.tick_params(labelsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with text/ and image/")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--only", nargs="*", choices=RUNS, metavar="NAME", help="; ".join(RUNS))
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    if not (options.data / "text").is_dir():
        parser.error(f"--data {options.data} has no folder text")
    make_models(options.data, options.out / "models")
    rows = make_rows(options.data, options.out / "rows")
    found, failed = {}, []
    print(f"means of the first and of the last {ENDS} steps\n\n| algorithm | rows | loss | what must rise |\n|---|---|---|---|")
    for name in tqdm(options.only or RUNS, unit="run", disable=not sys.stderr.isatty()):
        run = RUNS[name]
        if len(read(folder_of(name, options.out))) < options.steps:
            train(name, rows[run.rows], options.out, options.steps)
        found[name] = read(folder_of(name, options.out))
        loss, measures = ends(found[name], "loss"), {key: ends(found[name], key) for key in run.rises}
        improved = loss[1] < loss[0] and all(last > first for first, last in measures.values())
        failed += [] if improved else [name]
        shown = "; ".join(f"{key} {first:.3g} -> {last:.3g}" for key, (first, last) in measures.items())
        tqdm.write(f"| {name} | {run.rows} | {loss[0]:.4g} -> {loss[1]:.4g} | {shown} |" + ("" if improved else "  NOT IMPROVED"))
    draw(found, options.out / "curves.png")
    print(f"curves: {options.out / 'curves.png'}")
    if failed:
        sys.exit(f"not improved: {', '.join(failed)}")


if __name__ == "__main__":
    main()
