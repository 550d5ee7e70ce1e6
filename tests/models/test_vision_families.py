"""Vision-language families without PyTorch: what of a config is refused, a DPO step on eight devices, programs that do not grow."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner import sharding
from aligner.convert import model_from_folder
from aligner.data import loader
from aligner.models import from_hf
from aligner.models.pictures import Picture, turned, turning_positions
from aligner.types import UserError
from tests.data import tiny as data_tiny
from tests.everyday import everyday
from tests.invariance import step
from tests.models import tiny, vision_folders
from tests.models.vision_configs import CASES, VIDEOS, Case, batch, hf_config

REFUSED = {
    "tower": ("llava", lambda hf: setattr(hf.vision_config, "model_type", "vit"), "llava checkpoint with a 'vit' part is not supported"),
    "act": ("qwen2_vl", lambda hf: setattr(hf.vision_config, "hidden_act", "mish"), "hidden_act 'mish' of the vision config"),
    "select": ("llava_next", lambda hf: setattr(hf, "vision_feature_select_strategy", "full"), "leaves 17 features of 16 patches"),
    "layers": ("internvl", lambda hf: setattr(hf, "vision_feature_layer", [1, 2]), r"vision_feature_layer=\[1, 2\]"),
    "mask": ("internvl", lambda hf: setattr(hf.vision_config, "use_mask_token", True), "with a mask token, is not implemented"),
    "rope": ("qwen2_5_vl", lambda hf: hf.text_config.rope_parameters.update(rope_type="dynamic", factor=2.0), "rope_type 'dynamic'"),
    "pool": ("llava_next_video", lambda hf: setattr(hf, "spatial_pool_mode", "conv"), "spatial_pool_mode 'conv' of the llava_next_video config"),
    "prompt": ("paligemma", lambda hf: setattr(hf.text_config, "model_type", "llama"), "paligemma checkpoint with a 'llama' part"),
    "text": ("llava", lambda hf: setattr(hf.text_config, "model_type", "lama"), "llava checkpoint with a 'lama' part is not supported"),
    "hearing": ("qwen2_audio", lambda hf: setattr(hf.audio_config, "model_type", "whisper"), "qwen2_audio checkpoint with a 'whisper' part"),
    "sound": ("qwen2_audio", lambda hf: setattr(hf.audio_config, "activation_function", "mish"), "activation_function 'mish' of the audio"),
    "unknown": ("gemma3", lambda hf: setattr(hf.vision_config, "num_channels", 4) or setattr(hf.text_config, "use_bidirectional_attention", True),
                "use_bidirectional_attention"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(name):
    family, change, words = REFUSED[name]
    hf = copy.deepcopy(hf_config(family, CASES[family][0]))
    change(hf)
    with pytest.raises(UserError, match=words):
        from_hf(hf)


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_a_dpo_step_on_eight_devices_gives_what_one_gives(family, tmp_path):
    """Tensor 2 x fsdp 4, on rows of no, one and two pictures, and clips, as the loader gives them."""
    model = model_from_folder(vision_folders.save(tmp_path, family))
    rows = vision_folders.rows(tmp_path / "rows", videos=family in VIDEOS, sounds=family == "qwen2_audio")
    dataset = loader.load_dataset(data_tiny.config(rows, image_folder=str(rows.parent)), "train", model)
    made = [dataset.row(i) for i in range(8)]
    made = {name: np.stack([row[name] for row in made]) for name in made[0]}
    made["reference_logps"] = np.random.default_rng(1).normal(-20, 5, (8, 1, 2)).astype(np.float32)
    f = tiny.Family(model, tiny.perturbed(model), [], made["reference_logps"])
    one = step.loss_and_gradients(f, made, tiny.config(), step.one_device())
    eight = step.loss_and_gradients(f, made, tiny.config(), sharding.make_mesh({"tensor": 2, "fsdp": 4}))
    assert abs(one.metrics["loss"] - eight.metrics["loss"]) <= 1e-5 * abs(one.metrics["loss"])
    largest = max(np.abs(g).max() for g in one.gradients.values())
    for path, gradient in one.gradients.items():
        assert np.abs(gradient - eight.gradients[path]).max() <= 1e-5 * largest, path


@pytest.mark.parametrize("family", ["idefics3", "smolvlm", "internvl"])
def test_every_tile_of_an_image_is_in_its_row(family, tmp_path):
    """Each placeholder reads a feature of its own, and every slot that they read is filled."""
    model = model_from_folder(vision_folders.save(tmp_path, family))
    rows = vision_folders.rows(tmp_path / "rows")
    dataset = loader.load_dataset(data_tiny.config(rows, image_folder=str(rows.parent)), "train", model)
    made = [dataset.row(i) for i in range(dataset.size)]
    for row in made:
        read = row["media_index"][row["media_index"] >= 0]
        assert len(np.unique(read)) == row["image_mask"].sum() * model.media.features
        assert set(read // model.media.features) == set(np.flatnonzero(row["image_mask"]))
    assert max(row["image_mask"].sum() for row in made) > 2  # rows show two images at most


def test_the_program_does_not_grow_with_depth():
    """Of decoder and tower, whose layers differ in their windows."""
    lines = []
    for depth in (8, 32):
        case = CASES["qwen2_5_vl"][0]
        case = Case(*copy.deepcopy((case.text, case.vision)))
        case.text[1]["num_hidden_layers"] = case.vision[1]["depth"] = depth
        model = from_hf(hf_config("qwen2_5_vl", case))
        params = jax.eval_shape(model.init, jax.random.key(0))
        rows = model.inputs(batch("qwen2_5_vl", hf_config("qwen2_5_vl", case), [0]))
        loss = lambda params, model=model, rows=rows: jnp.sum(model.apply(params, rows, features=model.encode(params, rows)).hidden)
        lines.append(len(jax.jit(jax.grad(loss)).lower(params).as_text().splitlines()))
    assert lines[1] <= 1.05 * lines[0]


# ---- positions in rows and columns


def test_positions_turn_in_rows_and_columns():
    """Two words, a picture of 2 x 3, a word; two answers go on after the prompt, each for itself."""
    media = np.array([-1, -1, 0, 1, 2, 3, 4, 5, -1, -1, -1, -1])
    role = np.array([0] * 9 + [1, 2, 2])
    row = dict(tokens=np.ones(12), segment_ids=np.ones(12, int), role=role, media_index=media)
    found = turning_positions(row, [Picture({}, np.arange(6), turned(2, 3))])["rope_positions"]
    text = lambda n: [n, n, n]
    inside = [[2, 2 + r, 2 + c] for r in range(2) for c in range(3)]
    np.testing.assert_array_equal(found, [text(0), text(1), *inside, text(5), text(6), text(6), text(7)])


@pytest.mark.parametrize("family", everyday(["qwen2_vl", "qwen3_vl", "llava_onevision", "mllama"], "qwen2_vl"))
def test_a_row_without_pictures_is_read_as_it_is_by_itself(family, tmp_path):
    """Also where other rows have some, and something is said of every token because of them."""
    model = model_from_folder(vision_folders.describe(tmp_path, family))
    rows = vision_folders.rows(tmp_path / "rows", 3)
    dataset = loader.load_dataset(data_tiny.config(rows, image_folder=str(rows.parent)), "train", model, progress=False)
    row = {name: jnp.asarray(array)[None] for name, array in dataset.row(0).items()}
    text = {name: row[name] for name in ("tokens", "positions", "segment_ids", "role")}
    assert set(model.media.per_token) <= set(row) and not row["image_mask"].any()
    params = tiny.as_arrays(tiny.perturbed(model))
    among = model.apply(params, row, features=model.encode(params, row)).hidden
    real = np.asarray(row["segment_ids"] > 0)
    np.testing.assert_allclose(np.asarray(among)[real], np.asarray(model.apply(params, text).hidden)[real], atol=1e-4)
