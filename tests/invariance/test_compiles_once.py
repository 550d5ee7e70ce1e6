"""A whole run compiles its step once: the state that comes out is like the one that went in."""

import jax
import pytest

from aligner import metrics, run, train_step
from scripts import make_tiny_checkpoint
from tests.models import tiny


@pytest.mark.slow
def test_two_steps_and_two_more(tmp_path, monkeypatch, demo):
    made, mesh = {}, dict(data=2, fsdp=2, tensor=2)

    def recording(function, mesh=None, **options):
        jitted = jax.jit(function, compiler_options=tiny.QUICK | {"xla_allow_excess_precision": False}, **options)
        made.setdefault(getattr(function, "__name__", ""), []).append(jitted)
        return jitted

    monkeypatch.setattr(train_step, "jit", recording)
    changes = dict(model__path=str(demo / "model"), data__max_length=128, data__pad_to_multiple=8, optim__weight_decay=0.1,
                   optim__freeze=("vision_tower/.*",), log__every=1, checkpoint__every=2, data__workers=2,
                   **{f"mesh__{axis}": size for axis, size in mesh.items()})  # fmt: skip
    config = tiny.config(**changes)
    config.data.train.path = str(demo / "data" / "train.jsonl")
    for steps in (2, 4):  # the second time from the checkpoint of the first
        config.train.steps = steps
        run.run(config, tmp_path / "run")
    assert [step._cache_size() for step in made["step"]] == [1, 1]
    records = metrics.read(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["nonfinite"] == 0 for record in records)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make_tiny_checkpoint.make_llava(
        folder / "model", vocab_size=300, hidden_size=16, heads=2, kv_heads=2, image_size=16, patch_size=8, vision_hidden_size=8,
        vision_layers=2, vision_heads=2,
    )  # fmt: skip
    make_tiny_checkpoint.make_pictures(folder / "data", n_train=16, n_heldout=2, size=16)
    return folder
