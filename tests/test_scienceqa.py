"""Real pictures and questions through the public command line: ScienceQA as pairs, the right option against a wrong one."""

import json
import re
from pathlib import Path

import pytest

from tests.resume.runs import ROOT, complete, log_of, records

SCIENCEQA = Path(ROOT).parent / "shared" / "data" / "image" / "scienceqa"
pytestmark = pytest.mark.skipif(not SCIENCEQA.is_dir(), reason="the folder of real data, ../shared/data, is not here")


def pair(row):
    """A question in LLaVA's format, options in its text and the right letter as its label, as a preference."""
    question = row["conversations"][0]["value"]
    options = dict(re.findall(r"^\(([A-Z])\) (.+?) *$", question, re.MULTILINE))
    wrong = next(letter for letter in options if letter != row["label"])
    answer = lambda letter: f"({letter}) {options[letter]}"
    return {"image": row["image"], "question": question, "chosen": answer(row["label"]), "rejected": answer(wrong)}


@pytest.mark.slow
def test_trains_on_pairs(tmp_path):
    questions = json.loads((SCIENCEQA / "questions.json").read_text())
    pairs = [pair(row) for row in questions]
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))

    workdir = tmp_path / "run"
    complete(
        workdir,
        {
            "data.train.path": file,
            "data.train.image_folder": SCIENCEQA / "images",
            "data.eval.path": "",
            "data.max_length": 320,  # the longest do not fit
            "data.max_bad_fraction": 0.5,
            "data.batch_size": 8,
            "data.pad_to_multiple": 64,
            "train.steps": 3,
        },
    )
    told = log_of(workdir).read_text()
    kept, rows = map(int, re.search(r"(\d+) of (\d+) rows kept", told).groups())
    dropped = {reason: int(count) for reason, count in re.findall(r"dropped, ([\w ]+): (\d+) \(rows \d+", told)}
    assert rows == len(questions)
    assert kept + sum(dropped.values()) == rows
    assert dropped.keys() == {"too long"}  # every picture is read
    assert kept > rows / 2
    steps = records(workdir, "train")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert abs(steps[0]["loss"] - 0.693147) < 1e-5  # the policy is the reference
    assert steps[2]["loss"] != steps[0]["loss"]
    assert all(step["grad_norm"] > 0 for step in steps)
