"""Two processes of four devices each: every row once an epoch, and killed anywhere the order goes on as if nothing had happened."""

import time

import numpy as np
import pytest

from aligner import convert
from aligner.data.catalogue import with_template
from aligner.data.loader import batches, load_dataset
from aligner.run import ids_hash
from configs import dpo_llava
from tests.resume.runs import TIMEOUT, demo, log_of, preparing, records, saving, start_two, step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROWS, BATCH, STEPS = 20, 8, 5  # the third batch stands across the border of the two epochs
SETTINGS = {
    "data.train.size": ROWS,
    "data.eval.path": "",
    "data.batch_size": BATCH,
    "train.steps": STEPS,
    "train.eval_every": 0,
    "checkpoint.every": 1,
    "log.every": 1,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
}


def order():
    """[STEPS, BATCH]: the rows of each step, as one process alone would read them."""
    config = dpo_llava.get_config("tiny")
    config.data.train.path, config.data.train.size = str(demo() / "data" / "train.jsonl"), ROWS
    model, _ = convert.open_model(str(demo() / "model"))
    dataset = load_dataset(config, "train", with_template(model, config.data), progress=False)
    stream = batches(dataset, BATCH, seed=config.seed, shuffle=config.data.shuffle, epochs=2)
    return [batch["example_id"] for batch in stream]


def ended(processes):
    try:
        return [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()


def kill_when(moment, workdir):
    """Start both, and kill both at the moment, as when the machines go down."""
    processes = start_two(workdir, SETTINGS)
    try:
        until = time.monotonic() + TIMEOUT
        while not moment(workdir):
            assert all(process.poll() is None for process in processes) and time.monotonic() < until, log_of(workdir).read_text()
            time.sleep(0.001)
    finally:
        for process in processes:
            process.kill()
    assert ended(processes) == [-9, -9]


def test_each_row_once_an_epoch_and_killed_anywhere_the_order_goes_on(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert ended(start_two(whole, SETTINGS)) == [0, 0], log_of(whole).read_text()
    expected = order()
    ids = np.concatenate(expected).ravel()
    assert len(expected) == STEPS and sorted(ids[:ROWS]) == sorted(ids[ROWS:]) == list(range(ROWS)) and (ids[:ROWS] != ids[ROWS:]).any()
    # the logged names are made of the rows that were on the devices, all eight
    assert [record["example_ids_hash"] for record in records(whole, "train")] == [ids_hash(batch) for batch in expected]
    for moment in (preparing, step(1), saving(3)):
        kill_when(moment, killed)
    assert ended(start_two(killed, SETTINGS)) == [0, 0], log_of(killed).read_text()
    assert "goes on from step" in log_of(killed).read_text()
    assert (killed / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
