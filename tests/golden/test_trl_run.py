"""A whole short run against TRL's: after three optimizer steps with accumulation, clipping, decay and warm-up the weights are the same."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from aligner import metrics, run
from tests.golden import trl_dpo
from tests.golden.checkpoints import LLAMA, load_hf, perturb, rename_parameters, save_llama
from tests.golden.compare import relative
from tests.models import tiny

STEPS, BATCH, ACCUMULATE = 3, 16, 2  # a micro-batch has a row for each of the tests' eight devices
SAME = ("loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/margins", "logps/rejected")  # whatever the micro-batches


@pytest.mark.slow
def test_dpo(tmp_path):
    from transformers import AutoTokenizer

    policy, reference = (save_llama(tmp_path / name, **LLAMA["biases"]) for name in ("policy", "reference"))
    perturb(load_hf(policy), scale=0.05, seed=7).save_pretrained(policy)
    rng = np.random.default_rng(0)
    text = lambda: " ".join(f"t{i}" for i in rng.integers(8, 70, rng.integers(1, 9)))
    rows = [{"prompt": text(), "chosen": " " + text(), "rejected": " " + text()} for _ in range(STEPS * BATCH)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trainer = trl_dpo.trainer(
        load_hf(policy), load_hf(reference), AutoTokenizer.from_pretrained(policy), rows, per_device_train_batch_size=BATCH // ACCUMULATE,
        gradient_accumulation_steps=ACCUMULATE, max_steps=STEPS, learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=0.4,
        weight_decay=0.1, max_grad_norm=0.3, logging_steps=1, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer.train()

    config = tiny.config(
        model__path=str(policy), reference__kind="copy", reference__model=str(reference), optim__learning_rate=1e-2, optim__schedule="cosine",
        optim__warmup=0.4, optim__weight_decay=0.1, optim__max_grad_norm=0.3, train__steps=STEPS, train__accumulate=ACCUMULATE,
        data__batch_size=BATCH, data__shuffle=False, log__every=1, checkpoint__export=True,
    )  # fmt: skip
    config.data.train.path = str(tmp_path / "rows.jsonl")
    run.run(config.lock(), tmp_path / "run")
    theirs = [record for record in trainer.state.log_history if "loss" in record]
    for ours, wanted in zip(metrics.read(tmp_path / "run"), theirs, strict=True):
        for name in SAME:
            assert ours[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), (ours["step"], name)
        assert ours["grad_norm"] > 0.3  # clipped
    [file] = (tmp_path / "run" / "export").glob("*.safetensors")
    trained = load_file(file)
    for name, parameter in rename_parameters(trainer.model).items():
        assert relative(trained[name], parameter.detach().numpy()) <= 1e-5, name
