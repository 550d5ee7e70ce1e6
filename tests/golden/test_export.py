"""What was trained here gives the same logits in PyTorch: the whole way, command line to `from_pretrained`."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.torch_required import torch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir of the tiny preset after three steps, with the vision tower frozen so that export must read the base again."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    command = [sys.executable, "-m", "aligner.main", "--config", "configs/dpo_llava.py:tiny", "--workdir", str(workdir)]
    command += ["--config.train.steps=3", "--config.checkpoint.every=2", "--config.data.eval.path="]
    command += ["--config.optim.freeze=('vision_tower/.*',)"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return workdir


def compare(folder, workdir):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    import aligner

    processor = AutoProcessor.from_pretrained(folder)
    theirs, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    picture = Image.open(sorted((workdir / "demo" / "data").rglob("*.png"))[0])
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the shape?"}]}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(text=text, images=picture, return_tensors="pt")
    with torch.no_grad():
        expected = theirs.float()(**inputs).logits.numpy()
    model, params = aligner.load(folder)
    found = np.asarray(model.logits(params, {name: value.numpy() for name, value in inputs.items()}))
    assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    return theirs


@pytest.mark.slow
def test_export_at_the_end_of_a_run(trained):
    compare(trained / "export", trained)


@pytest.mark.slow
def test_to_hf_of_an_earlier_step_and_another_dtype(trained, tmp_path):
    out = tmp_path / "hf"
    command = [sys.executable, "-m", "aligner.convert", "to-hf", "--workdir", str(trained), "--out", str(out)]
    command += ["--step", "2", "--dtype", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16
    theirs = compare(out, trained)
    last = compare(trained / "export", trained)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    early, late = theirs.get_parameter(name), last.get_parameter(name)
    assert 0 < (early - late).abs().max() < 0.1, "step 2 and step 3 are different checkpoints of one run"
