"""The page shows what was read: tokens, masks, drops with their rows, lengths, the template."""

import json
import re

from ml_collections import ConfigDict

from aligner import preview
from aligner.data.loader import load_dataset
from tests.data import tiny


def test_a_page(tmp_path):
    rows = [{"prompt": f"what is {i}", "chosen": " yes" * (i + 1), "rejected": " yes no"} for i in range(6)]
    rows += [{"prompt": "p <b>", "chosen": "same", "rejected": "same"}, {"prompt": "p", "chosen": None, "rejected": "a"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny.text_model()
    dataset = load_dataset(tiny.config(path), "train", model, progress=False)
    shown = preview.page(ConfigDict({"model": {"path": "some/model"}}), model, [dataset], rows=2)
    assert "6 of 8 rows kept" in shown and shown.count('<div class="row">') == 2
    assert "answers are equal" in shown and "p &lt;b&gt;" in shown and "<b>" not in shown.replace("&lt;b&gt;", "")
    assert f"6 rows, {dataset.fill:.1%} of their {dataset.shape[0]} columns are filled" in shown
    counts = [int(n) for n in re.findall(r"<td>\d+ to \d+</td><td>(\d+)</td>", shown)]
    assert sum(counts) == dataset.size and dataset.lengths.tolist() == [int((dataset.row(i)["segment_ids"] > 0).sum()) for i in range(6)]
    for what in ('class="prompt"', 'class="trained1', 'class="trained2', "common", "endfor"):
        assert what in shown, what
    assert not re.search(r'(src|href)="(?!data:)', shown), "it loads nothing"


def test_lengths_of_packed_rows(tmp_path):
    rows = [{"prompt": f"what is {i}", "chosen": " yes" * (i + 1), "rejected": " no"} for i in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset(tiny.config(path, packing=True, packed_length=128), "train", tiny.text_model(), progress=False)
    assert dataset.lengths.tolist() == [int((dataset.row(i)["segment_ids"] > 0).sum()) for i in range(dataset.size)]
