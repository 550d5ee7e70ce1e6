"""Every config file can be read, says how it is run, and runs: two steps of its `:tiny` preset on eight simulated devices."""

import functools
import importlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from aligner import metrics, run
from aligner.algorithms import ONLINE
from configs import common
from scripts.audio_demo import make_qwen2_audio, make_sounds
from scripts.make_tiny_checkpoint import make_llama, make_llava, make_pictures
from scripts.text_demo import make_text
from tests.models import tiny
from tests.resume.runs import ROOT

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common", "online"))
STARTS = {f"{algorithm}_{family}" for algorithm in ("sft", "dpo", "kto", "orpo", "simpo", "reward") for family in ("llama3", "qwen", "llava")}
SMALL = dict(vocab_size=300, hidden_size=16, layers=1, heads=2, kv_heads=2)


def read(name: str, argument: str = "") -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(argument)


def keys(config: ConfigDict) -> set[str]:
    """Every key by its dotted name; of the algorithm's, which differ, only the name."""
    found = {f"{section}.{key}" for section in config for key in (config[section] if isinstance(config[section], ConfigDict) else [""])}
    return {key for key in found if not key.startswith("algorithm.")}


def test_there_is_one_for_each_algorithm_and_family():
    assert set(CONFIGS) >= STARTS | {"cpt_llama3", "distill_llama3", "reward_safe_rlhf", "cost_safe_rlhf"}
    assert set(CONFIGS) >= {"sft_zephyr", "dpo_zephyr", "sft_zephyr_qlora", "dpo_zephyr_qlora", "dpo_llava_qlora"}


@pytest.mark.parametrize("name", CONFIGS)
def test_is_read_and_says_how_it_is_run(name):
    module = importlib.import_module(f"configs.{name}")
    large, small = read(name), read(name, "tiny")
    for config in (large, small):
        assert keys(config) == keys(common.base()) and config.is_locked
        assert set(config.algorithm) == set(getattr(common, name_of(config.algorithm.name))())
    before, _, after = module.__doc__.partition("COMMAND")
    assert before.strip() and f"--config configs/{name}.py --workdir runs/{name}" in after
    assert f"--config configs/{name}.py:tiny --workdir runs/{name}_tiny" in after
    assert not large.setup and large.model.path and large.data.train.path
    assert small.setup and "{workdir}" in small.model.path + small.data.train.path + small.data.eval.path
    with pytest.raises(ValueError, match="unknown preset 'tinny'; there is tiny"):
        read(name, "tinny")


def name_of(algorithm: str) -> str:
    return {"cpt": "sft"}.get(algorithm, algorithm)


def test_the_scan_of_zephyr():
    for loss in ("sigmoid", "ipo", "kto"):
        for argument in (f"{loss},0.5", f"{loss},0.5,tiny"):
            config = read("dpo_zephyr", argument)
            assert (config.algorithm.beta, bool(config.setup)) == (0.5, "tiny" in argument)
            assert config.algorithm.loss_type == ("kto" if loss == "kto" else (loss,))
    assert read("dpo_zephyr").algorithm.beta == 0.01


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Callable[[str], Path]:
    """The folder that a preset's setup would make, smaller, and made once."""

    @functools.cache
    def make(setup: str) -> Path:
        folder = tmp_path_factory.mktemp("demo")
        if setup == "setup_llava_demo":
            make_llava(folder / "model", image_size=16, patch_size=8, vision_hidden_size=8, vision_layers=2, vision_heads=2, **SMALL)
            make_pictures(folder / "data", n_train=16, n_heldout=8, size=16)
        elif setup == "setup_qwen2_audio_demo":
            make_qwen2_audio(folder / "model", audio_hidden_size=8, audio_heads=2, bands=8, **SMALL)
            make_sounds(folder / "data", n_train=16, n_heldout=8)
        else:
            make_llama(folder / "model", "qwen2" if setup == "setup_qwen_demo" else "llama", **SMALL)
            make_text(folder / "data", n_train=128, n_heldout=64)
        if setup == "setup_teacher_demo":
            make_llama(folder / "teacher", seed=1, **SMALL | {"hidden_size": 8})
        return folder

    return make


OFFLINE = [name for name in CONFIGS if read(name).algorithm.name not in ONLINE]  # the presets of the others run in tests/rl


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLINE)
def test_two_steps(name, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "jit", lambda function, mesh=None, **options: tiny.quick(function, **options))
    config = read(name, "tiny")
    (tmp_path / "demo").symlink_to(demo(config.setup.split(":")[1]))
    config.data.batch_size = 8
    config.train.steps = 2
    config.mesh.update(dict(data=2, fsdp=2, tensor=2))
    if config.quant.base:
        config.lora.rank = 2
    last = run.run(config, tmp_path)
    records = metrics.read(tmp_path)
    assert [record["step"] for record in records if record["split"] == "train"] == [1, 2]
    assert {record["step"] for record in records if record["split"] == "eval"} == {2}
    assert {record.get("dataset", "") for record in records if record["split"] == "eval"} == {"", *config.data.evals}
    losses = [record["loss"] for record in [*records, last] if "loss" in record]  # held-out answers of online training have a reward alone
    assert all(math.isfinite(loss) and abs(loss) < 100 for loss in losses) and len(losses) >= 2
    assert all(record["grad_norm"] > 0 for record in records if record["split"] == "train")
    assert (tmp_path / "export").exists() == config.checkpoint.export
