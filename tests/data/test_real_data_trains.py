"""Every dataset of ../shared/data through the public command line: it loads, and trains five steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aligner.data.__main__ import parser
from aligner.data.__main__ import run as rows_command
from scripts.audio_demo import make_qwen2_audio
from tests.models import vision_folders
from tests.resume.runs import ROOT, TIMEOUT, WITHOUT_TORCH, demo

SHARED = ROOT.parent / "shared" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real data, ../shared/data, is not here"),
]

CONFIG = """
from configs import common
def get_config(preset=""):
    config = common.base()
    config.algorithm = common.{algorithm}()
    return config.lock()
"""
LONG = {"data.max_length": 4096, "data.batch_size": 1}


def best_answer(row):
    """TruthfulQA's table: a question and the best of its answers."""
    from aligner.data.formatters import assistant, user
    from aligner.data.samples import Supervised

    return Supervised([assistant(row["Best Answer"])], [user(row["Question"])])


def first_turns(row):
    """MT-Bench's questions have reference answers for some."""
    from aligner.data.formatters import assistant, user
    from aligner.data.samples import Supervised

    return Supervised([assistant(row["reference"][0])], [user(row["turns"][0])])


def solution(row):
    from aligner.data.samples import Supervised

    return Supervised(row["canonical_solution"], row["prompt"])


DATASETS = {
    "text/hh_rlhf_harmless.jsonl": ("dpo", {}),
    "text/dpo_en_demo.json": ("dpo", {}),
    "text/autoalign_dummy_dpo.json": ("dpo", LONG),
    "text/autoalign_ultra_binary.jsonl": ("dpo", LONG),
    "text/pku_saferlhf_32.json": ("dpo", {}),
    "text/kto_en_demo.json": ("kto", {}),
    "text/gsm8k.jsonl": ("sft", {}),
    "text/alpaca_en_demo.json": ("sft", {}),
    "text/alpaca_32.json": ("sft", {}),
    "text/autoalign_dummy_sft.json": ("sft", {}),
    "text/wiki_demo.txt": ("sft", {"algorithm.name": "cpt"}),
    "image/mllm_demo.json": ("sft", {}),
    "image/scienceqa/questions.json": ("sft", {"data.train.image_folder": SHARED / "image" / "scienceqa" / "images"}),
    "image/vl_sft.json": ("sft", LONG),
    "image/vl_ranked_rewards.json": ("dpo", LONG),
    "audio/mllm_audio_demo.json": ("sft", LONG),
    "video/mllm_video_demo.json": ("sft", {}),
    "eval/TruthfulQA.csv": ("sft", {"data.train.formatter": f"{__name__}:best_answer"}),
    "eval/mt_bench_question.jsonl": ("sft", {"data.train.formatter": f"{__name__}:first_turns"}),
    "eval/HumanEval.jsonl.gz": ("sft", {"data.train.formatter": f"{__name__}:solution"}),
}


def run(config, workdir, settings):
    given = {
        "model.path": demo() / "model",
        "model.dtype": "float32",
        "reference.kind": "copy",  # nothing is computed over all rows
        "data.max_length": 512,
        "data.max_bad_fraction": 0.99,  # a byte is almost a token to the small tokenizer, so many rows are too long
        "data.batch_size": 2,
        "train.steps": 5,
        "checkpoint.every": 5,
        "log.every": 1,
        **settings,
    }
    command = [f"--config={config}", f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in given.items())]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )


@pytest.mark.parametrize("name", DATASETS)
def test_five_steps(name, tmp_path):
    algorithm, settings = DATASETS[name]
    (tmp_path / "config.py").write_text(CONFIG.format(algorithm=algorithm))
    settings = {"data.train.path": SHARED / name, **settings}
    if name.startswith("image/vl_"):  # their pictures are not there
        from PIL import Image

        for row in json.loads((SHARED / name).read_text()):
            Image.new("RGB", (20, 10)).save(tmp_path / Path(row["image"]).name)
        settings["data.train.image_folder"] = tmp_path
    if name.startswith("audio/"):
        settings["model.path"] = tmp_path / "model"
        make_qwen2_audio(tmp_path / "model", seconds=30, hidden_size=32, audio_hidden_size=16)
    if name.startswith("video/"):
        settings["model.path"] = vision_folders.save(tmp_path / "model", "llava_next_video")
    done = run(tmp_path / "config.py", tmp_path / "run", settings)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    assert all(0 < step["loss"] < 10 and step["grad_norm"] > 0 for step in steps)


def test_a_model_that_hears_nothing_says_so(tmp_path):
    """Before anything is trained; as samples the sounds load."""
    name = "audio/mllm_audio_demo.json"
    (tmp_path / "config.py").write_text(CONFIG.format(algorithm="sft"))
    done = run(tmp_path / "config.py", tmp_path / "run", {"data.train.path": SHARED / name})
    assert 'samples: {"Supervised": 3}' in "\n".join(rows_command(parser().parse_args([str(SHARED / name), "--stats"])))
    assert done.returncode == 2 and "holds an audio, but the llava model takes text, image only" in done.stderr


def test_all_files_are_named():
    files = {str(path.relative_to(SHARED)) for path in SHARED.glob("*/**/*") if path.suffix in (".json", ".jsonl", ".txt", ".csv", ".gz")}
    waiting = {"tokenizers/clip/bpe_simple_vocab_16e6.txt.gz"}
    assert files - waiting == set(DATASETS)
