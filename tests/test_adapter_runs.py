"""Runs with adapters from end to end: stopped and gone on with, exported merged and as an adapter, on a quantised base too."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import aligner
from aligner import convert, lora, metrics, run, workdir
from aligner.convert import __main__ as command
from aligner.convert import peft
from aligner.trees import flatten
from aligner.types import UserError
from scripts import make_tiny_checkpoint
from tests.models import tiny


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make_tiny_checkpoint.make_llava(
        folder / "model", vocab_size=300, hidden_size=16, heads=2, kv_heads=2, image_size=16, patch_size=8, vision_hidden_size=8,
        vision_layers=2, vision_heads=2,
    )  # fmt: skip
    make_tiny_checkpoint.make_pictures(folder / "data", n_train=16, n_heldout=2, size=16)
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    quick = tiny.QUICK | {"xla_allow_excess_precision": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "jit", lambda function, mesh=None, **options: jax.jit(function, compiler_options=quick, **options))
        yield


def configure(demo, **changes):
    given = dict(model__path=str(demo / "model"), data__max_length=128, data__pad_to_multiple=8, log__every=1, checkpoint__every=2,
                 data__workers=2, lora__rank=2, optim__learning_rate=1e-2, optim__schedule="constant", optim__warmup=0.0)  # fmt: skip
    config = tiny.config(**{**given, **changes})
    config.data.train.path = str(demo / "data" / "train.jsonl")
    return config


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """A run of four steps, stopped after two and gone on with, exported at its end."""
    folder = tmp_path_factory.mktemp("runs")
    config = configure(demo, reference__kind="base", lora__dropout=0.1, checkpoint__export=True)
    config.data.train.size = config.data.batch_size  # every step has all rows, so that what one learned shows in the next
    for steps in (2, 4):
        config.train.steps = steps
        run.run(config, folder / "twice")
    run.run(config, folder / "once")
    return folder


def losses(folder):
    return [record["loss"] for record in metrics.read(folder) if record["split"] == "train"]


@pytest.mark.slow
def test_goes_on_to_the_same_numbers(trained):
    assert losses(trained / "twice") == losses(trained / "once")
    assert losses(trained / "once")[0] == pytest.approx(np.log(2), rel=1e-6)
    assert losses(trained / "once")[3] < losses(trained / "once")[0] - 1e-3
    assert load_file(trained / "twice/export/model.safetensors").keys() == load_file(trained / "once/export/model.safetensors").keys()


@pytest.mark.slow
def test_only_adapters_are_saved(trained):
    _, adapters, trainable, step = workdir.restore_trainable(trained / "once")
    assert step == 4 and set(flatten(trainable)) == {f"{m}/{leaf}" for m in adapters.rank for leaf in ("lora_a", "lora_b")}
    saved = sum(file.stat().st_size for file in (trained / "once/checkpoints/4").rglob("*") if file.is_file())
    numbers = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    assert saved < 3 * 4 * numbers + 200_000, "adapters and their two moments, no base"


@pytest.mark.slow
def test_exports_merged_and_as_an_adapter(trained, demo, tmp_path, capsys):
    source = ["to-hf", "--workdir", str(trained / "once"), "--out"]
    assert command.main([*source, str(tmp_path / "merged")]) == 0
    assert command.main([*source, str(tmp_path / "adapter"), "--adapter"]) == 0
    assert "adapter of step 4" in capsys.readouterr().out
    merged, exported = load_file(tmp_path / "merged/model.safetensors"), load_file(trained / "once/export/model.safetensors")
    base = load_file(demo / "model/model.safetensors")
    assert merged.keys() == exported.keys() == base.keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(exported[name], tensor, rtol=0, atol=1e-6)
        adapted = "language_model.model.layers" in name and "_proj." in name
        assert (tensor.tobytes() == base[name].tobytes()) == (not adapted), name
    model, params = aligner.load(tmp_path / "merged")
    adapters, weights = peft.read(tmp_path / "adapter", model, convert.abstract_params(model))
    again = lora.attach(aligner.load(demo / "model")[1], adapters, weights, key=jax.random.key(0), dtype="float32")
    inputs = {"input_ids": np.random.default_rng(0).integers(5, 250, (2, 9))}
    expected = np.asarray(model.logits(params, inputs))
    assert np.abs(np.asarray(model.logits(again, inputs)) - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    assert json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())["base_model_name_or_path"] == str(demo / "model")


@pytest.mark.slow
def test_a_run_from_an_adapter_on_a_quantised_base(trained, demo, tmp_path):
    """Begins where the adapter stands, with the precomputed reference; merges into the unquantised base."""
    command.main(["to-hf", "--workdir", str(trained / "once"), "--out", str(tmp_path / "adapter"), "--adapter"])
    changes = dict(lora__adapter=str(tmp_path / "adapter"), quant__base="nf4", model__dtype="bfloat16", mesh__fsdp=2)
    config = configure(demo, **changes)
    config.train.steps = 1
    run.run(config, tmp_path / "run")
    assert losses(tmp_path / "run") == [pytest.approx(np.log(2), rel=1e-3)], "the reference carries the adapter too"
    _, params, _ = workdir.restore_params(tmp_path / "run")
    kept = flatten(aligner.load(demo / "model")[1])
    for path, leaf in flatten(params).items():
        adapted = path.startswith("language_model/model/layers/") and path.endswith("_proj/kernel")
        assert (np.asarray(leaf).tobytes() == np.asarray(kept[path]).tobytes()) == (not adapted), path
    settings = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
    settings["lora_alpha"] /= 2
    (tmp_path / "adapter" / peft.CONFIG).write_text(json.dumps(settings))
    config.train.steps = 2
    with pytest.raises(UserError, match=r"has alpha 16"):
        run.run(config, tmp_path / "run")


@pytest.mark.slow
def test_a_run_without_adapters_exports_none(demo, tmp_path):
    config = configure(demo, lora__rank=0)
    config.train.steps = 1
    run.run(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"has no adapters \(its config.lora.rank is 0\)"):
        arguments = command.parser().parse_args(["to-hf", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--adapter"])
        command.run_to_hf(arguments)
