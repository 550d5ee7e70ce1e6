"""From rows of every kind to batches."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from aligner.data.loader import batches, eval_batches, load_dataset
from aligner.data.samples import Unpaired, as_unpaired
from aligner.types import UserError
from tests.data import tiny
from tests.data.test_turns import NEVER


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path, needs, model=None, **options):
    return load_dataset(tiny.config(path, **options), "train", model or tiny.text_model(), needs, progress=False)


def talks(count):
    turn = lambda i: [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": "a cat" + " and a dog" * (i % 5)}]
    return [{"messages": turn(i) + turn(i + 1) * (i % 2)} for i in range(count)]


def judged(count):
    return [{"prompt": f"what is {i}", "completion": f" number {i}" + " yes" * (i % 4), "label": i % 3 == 0} for i in range(count)]


def all_of(dataset, size=4):
    """Epoch in order, as arrays over all rows."""
    seen = list(eval_batches(dataset, size))
    return {name: np.concatenate([batch[name] for batch in seen]) for name in seen[0]}


def scored_tokens(rows):
    """(example, role) -> the tokens that are scored, with the token that stands where each is predicted from."""
    found = {}
    for r, s in zip(*np.nonzero(rows["score_segment"])):
        key = (int(rows["example_id"][r, rows["score_segment"][r, s] - 1]), int(rows["score_role"][r, s]))
        source = rows["score_from"][r, s]
        values = rows["tokens"][r, source], rows["positions"][r, source], rows["score_token"][r, s]
        found.setdefault(key, []).append(tuple(map(int, values)))
    return found


# --- supervised ------------------------------------------------------------------------------------------------------------------


def test_supervised_packed_scores_the_same_tokens(tmp_path):
    path = write(tmp_path / "rows.jsonl", talks(23))
    plain, packed = load(path, "supervised"), load(path, "supervised", packing=True, max_length=160)
    assert plain.size == 23 and packed.size < 15 and packed.examples > 1 and packed.answers == 1
    assert packed.shape[0] == 160 and packed.fill > 0.75 > plain.fill
    assert any("packed into" in line and f"{packed.fill:.1%}" in line for line in packed.report)
    a, b = all_of(plain), all_of(packed)
    assert scored_tokens(a) == scored_tokens(b) and len(scored_tokens(a)) == 23
    for row in b["segment_ids"]:
        assert set(np.diff(row[row > 0])) <= {0, 1}
    starts = np.diff(b["segment_ids"], axis=1, prepend=0) > 0
    assert (b["positions"][starts] == 0).all(), "positions restart at each segment"


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 160}], ids=["plain", "packed"])
def test_every_row_once_an_epoch_and_resume(tmp_path, options):
    dataset = load(write(tmp_path / "rows.jsonl", talks(17)), "supervised", **options)
    epochs = [next(batches(dataset, dataset.size, seed=1, shuffle=True, start=k))["example_id"] for k in range(3)]
    for ids in epochs:
        assert np.sort(ids[ids >= 0]).tolist() == list(range(17))
    assert not np.array_equal(epochs[0], epochs[1])
    whole = [batch["example_id"] for batch in batches(dataset, 3, seed=1, shuffle=True, epochs=2)]
    for k in range(len(whole)):
        stream = batches(dataset, 3, seed=1, shuffle=True, epochs=2)
        stream.set_state({"next_batch": k})
        assert np.array_equal(next(stream)["example_id"], whole[k])


def test_packed_images(tmp_path):
    model = tiny.image_model()
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (9, 13, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    images = lambda i: [f"{j}.png" for j in range(i, i + i % 3)]
    rows = [{"images": images(i), "prompt": f"what is {i}", "chosen": "a cat", "rejected": "no"} for i in range(4)]
    path = write(tmp_path / "rows.jsonl", rows)
    plain, packed = load(path, "preference", model), load(path, "preference", model, packing=True, packed_length=400)
    assert packed.size == 1 and packed.shape[2] == 3 and packed.examples == 4

    def pictures(rows):
        """example -> pixels of its images in order, found through media_index."""
        found = {}
        for r, t in zip(*np.nonzero(rows["media_index"] >= 0)):
            example = int(rows["example_id"][r, rows["segment_ids"][r, t] - 1])
            image, feature = divmod(int(rows["media_index"][r, t]), model.media.features)
            if feature == 0:
                found.setdefault(example, []).append(rows["pixel_values"][r, image].tobytes())
        return found

    a, b = all_of(plain), all_of(packed)
    assert pictures(a) == pictures(b) and [len(pictures(a).get(i, ())) for i in range(4)] == [0, 1, 2, 0]
    assert scored_tokens(a) == scored_tokens(b)


def test_a_packed_row_must_hold_the_longest_example(tmp_path):
    with pytest.raises(UserError, match=r"packed_length is 20, but the longest example takes \d+ columns"):
        load(write(tmp_path / "rows.jsonl", talks(4)), "supervised", packing=True, packed_length=20)


def test_supervised_of_other_datasets(tmp_path):
    rows = [{"prompt": f"what is {i}", "chosen": " yes", "rejected": " no"} for i in range(3)]
    dataset = load(write(tmp_path / "pairs.jsonl", rows), "supervised")
    yes = tiny.tokenizer()(" yes</s>")["input_ids"]
    assert [[target for *_, target in scored] for scored in scored_tokens(all_of(dataset)).values()] == [yes] * 3
    with pytest.raises(UserError, match=r"loss_on is 'asistant'; it must be one of assistant, last, all"):
        load(tmp_path / "pairs.jsonl", "supervised", loss_on="asistant")


def test_rows_without_anything_to_imitate(tmp_path):
    rows = [*talks(3), {"messages": [{"role": "user", "content": "hm"}]}]
    assert load(write(tmp_path / "rows.jsonl", rows), "supervised").dropped == {"nothing to imitate": (1, [3])}
    silent = tiny.text_model(NEVER)
    with pytest.raises(UserError, match=r"4 of 4 rows .* none is left: nothing to imitate.*\{% for m in messages %\}"):
        load(tmp_path / "rows.jsonl", "supervised", silent)


def test_templates_with_marks_in_many_threads(tmp_path):
    """What notes the marks while a template renders is shared by threads: one at a time may render."""
    answer = "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    model = tiny.text_model("{% for m in messages %}[" + answer + "]{% endfor %}")
    path = write(tmp_path / "rows.jsonl", talks(60))
    one, many = (load(path, "supervised", model, workers=workers) for workers in (1, 16))
    assert one.dropped == many.dropped == {} and one.fingerprint == many.fingerprint


# --- text ------------------------------------------------------------------------------------------------------------------------


def test_running_text_fills_every_row(tmp_path):
    paragraphs = ["what is this picture of a cat " * (i % 7 + 1) for i in range(20)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs) + "\n\n\n")
    model = tiny.text_model(bos=True)
    dataset = load(path, "text", model, max_length=64)
    ids = [model.assets.tokenizer(text.strip() + "</s>")["input_ids"] for text in paragraphs]
    rows = all_of(dataset)
    real = rows["segment_ids"] > 0
    assert rows["tokens"][real].tolist() == [token for document in ids for token in document], "nothing lost, EOS between documents"
    assert real[: dataset.size - 1].all() and dataset.shape[0] == 64
    starts = np.diff(rows["segment_ids"], axis=1, prepend=0) > 0
    assert (rows["positions"][starts & real] == 0).all()
    count = sum(map(len, ids)) - int((starts & real).sum())
    assert (rows["score_segment"] > 0).sum() == count, "all but the first token of each piece"
    for r, s in zip(*np.nonzero(rows["score_segment"])):
        source = rows["score_from"][r, s]
        assert rows["tokens"][r, source + 1] == rows["score_token"][r, s]
        assert rows["segment_ids"][r, source + 1] == rows["segment_ids"][r, source] == rows["score_segment"][r, s]


@pytest.mark.parametrize(("sample_by", "count"), [("line", 4), ("paragraph", 2), ("document", 1)])
def test_documents_of_a_text_file(tmp_path, sample_by, count):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\nyes\n")
    assert load(tmp_path / "a.txt", "text", sample_by=sample_by).rows_total == count
    with pytest.raises(UserError, match="sample_by is 'page'"):
        load(tmp_path / "a.txt", "text", sample_by="page")


def test_text_is_no_conversation(tmp_path):
    with pytest.raises(UserError, match="columns messages; 'text' needs text"):
        load(write(tmp_path / "rows.jsonl", talks(2)), "text")


# --- unpaired --------------------------------------------------------------------------------------------------------------------


def test_unpaired_rows_carry_another_rows_answer(tmp_path):
    path = write(tmp_path / "rows.jsonl", judged(11))
    dataset = load(path, "unpaired")
    assert dataset.answers == 2 and dataset.size == 11
    rows = all_of(dataset)
    answers = {key: [target for *_, target in scored] for key, scored in scored_tokens(rows).items()}
    partners = {}
    for i in range(11):
        own = tiny.tokenizer()(f" number {i}" + " yes" * (i % 4) + "</s>")["input_ids"]
        assert answers[i, 1] == own
        (partners[i],) = [j for j in range(11) if answers[j, 1] == answers[i, 2]]
    assert sorted(partners.values()) == list(range(11)) and all(i != j for i, j in partners.items())
    present = rows["example_id"][:, 0] >= 0
    assert rows["label"].dtype == np.float32 and rows["label"].shape == rows["example_id"].shape
    assert rows["label"][present, 0].tolist() == [float(i % 3 == 0) for i in range(11)]
    assert not rows["label"][~present].any()


def test_partners_stay_through_shuffling_packing_and_processes(tmp_path):
    path = write(tmp_path / "rows.jsonl", judged(9))
    plain = scored_tokens(all_of(load(path, "unpaired")))
    dataset = load(path, "unpaired", packing=True, max_length=128)
    assert scored_tokens(all_of(dataset)) == plain
    shuffled = next(batches(dataset, dataset.size, seed=3, shuffle=True))
    assert scored_tokens(shuffled) == plain
    other = load(path, "unpaired", seed=1)
    assert scored_tokens(all_of(other)) != plain and other.fingerprint != dataset.fingerprint
    code = f"""
from tests.data.test_kinds import *
print(load({str(path)!r}, "unpaired", packing=True, max_length=128).fingerprint)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split()[-1] == dataset.fingerprint


def test_a_mismatched_answer_is_cut_where_it_does_not_fit(tmp_path):
    rows = [{"prompt": "what is" * 10, "completion": " no", "label": True}, {"prompt": "a", "completion": " yes" * 9, "label": False}]
    count = lambda text: len(tiny.tokenizer()(text)["input_ids"])
    limit = count(rows[0]["prompt"]) + 5
    dataset = load(write(tmp_path / "rows.jsonl", rows), "unpaired", max_length=limit)
    scored = scored_tokens(all_of(dataset))
    no, yes = count(" no</s>"), count(" yes" * 9 + "</s>")
    assert {key: len(found) for key, found in scored.items()} == {(0, 1): no, (0, 2): 5, (1, 1): yes, (1, 2): no}
    assert [target for *_, target in scored[0, 2]] == [target for *_, target in scored[1, 1]][:5]


def test_pairs_as_judged_answers(tmp_path):
    rows = [{"prompt": f"what is {i}", "chosen": f" yes {i}", "rejected": " no"} for i in range(3)]
    dataset = load(write(tmp_path / "pairs.jsonl", rows), "unpaired")
    assert dataset.size == dataset.rows_total == 6 and any("every pair makes two rows" in line for line in dataset.report)
    seen = all_of(dataset)
    assert seen["label"][:6, 0].tolist() == [1, 0, 1, 0, 1, 0]
    answers = [[target for *_, target in scored_tokens(seen)[i, 1]] for i in range(6)]
    assert answers[1] == answers[3] == tiny.tokenizer()(" no</s>")["input_ids"] and answers[0] != answers[2]


def test_labels_as_files_write_them(tmp_path):
    """CSV knows words alone: every row of such a file was dropped."""
    written = {"True": 1, "false": 0, "1": 1, "0": 0, "1.0": 1}
    (tmp_path / "rows.csv").write_text("prompt,completion,label\n" + "".join(f"q,a {i},{label}\n" for i, label in enumerate(written)))
    seen = all_of(load(tmp_path / "rows.csv", "unpaired_alone"))
    assert seen["label"][: len(written), 0].tolist() == [*written.values()]
    assert [as_unpaired(Unpaired("q", "a", label)).label for label in (True, 0, 1.0, np.float32(0))] == [True, False, True, False]


def test_labels_that_are_none(tmp_path):
    rows = judged(6)
    rows[1]["label"], rows[2]["label"], rows[4]["completion"] = "good", 0.5, " "
    dataset = load(write(tmp_path / "rows.jsonl", rows), "unpaired")
    assert dataset.dropped == {"label is neither true nor false": (2, [1, 2]), "empty answer": (1, [4])}
    assert any("row 1: 'good'; it must be true or false, or 1 or 0" in line for line in dataset.report)
    with pytest.raises(UserError, match=r"one row of .* is left, but each needs the answer of another"):
        load(write(tmp_path / "one.jsonl", judged(1)), "unpaired")


# --- ranked, and scores at the last token ----------------------------------------------------------------------------------------


def ranked(count):
    answers = ["best", "good", "bad", "worst"]
    gpt = lambda i: {"from": "gpt", "value": answers[: 2 + i % 3]}
    return [{"conversations": [{"from": "human", "value": f"what is {i}"}, gpt(i)]} for i in range(count)]


def test_ranked_lists_of_different_length(tmp_path):
    rows = ranked(6)
    rows[3]["conversations"][1]["value"] = ["only"]
    rows[4]["conversations"][1]["value"] = ["a", "b", "a"]
    dataset = load(write(tmp_path / "rows.jsonl", rows), "ranked")
    assert dataset.answers == 4 and dataset.dropped == {"no ranked answers": (1, [3]), "answers are equal": (1, [4])}
    found = scored_tokens(all_of(dataset))
    assert {i: max(role for j, role in found if j == i) for i in (0, 1, 2, 5)} == {0: 2, 1: 3, 2: 4, 5: 4}


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 256}, {"shared_prompt": False}], ids=str)
def test_one_score_an_answer_at_its_last_token(tmp_path, options):
    rows = [{"prompt": f"what is {i}", "chosen": " yes" * (i + 1), "rejected": " no", "margin": 0.5 * i} for i in range(5)]
    path = write(tmp_path / "rows.jsonl", rows)
    dataset = load(path, "preference_last", **options)
    found = all_of(dataset)
    G = dataset.examples
    assert dataset.shape[1] == 2 * G and found["margin"].shape[1:] == (G,)
    full, last = scored_tokens(all_of(load(path, "preference"))), scored_tokens(found)
    assert full.keys() == last.keys()
    for key, ((token, position, target),) in last.items():
        assert token == target == full[key][-1][2] and position == full[key][-1][1] + 1
    margins = {int(i): m for i, m in zip(found["example_id"].ravel(), found["margin"].ravel()) if i >= 0}
    assert margins == {i: 0.5 * i for i in range(5)}


def test_safety_of_answers(tmp_path):
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}
    row |= {"is_response_0_safe": True, "is_response_1_safe": False}
    path = write(tmp_path / "rows.jsonl", [row])
    safe = load(path, "cost_last", formatter="safe_rlhf_cost")
    assert all_of(safe)["safe"][0, 0].tolist() == [1, -1]
    assert any("formatter safe_rlhf:" in line for line in load(path, "preference_last").report)


def test_a_margin_that_is_no_number_is_no_margin(tmp_path):
    rows = [{"prompt": "q", "chosen": "a cat", "rejected": "a dog", "margin": margin} for margin in (1.5, float("nan"), None)]
    dataset = load(write(tmp_path / "rows.jsonl", rows), "preference_last", max_bad_fraction=0.5)
    assert dataset.dropped == {"margin is not finite": (1, [1])}
    assert load(tmp_path / "rows.jsonl", "preference").size == 3, "where margins are not learned, they do not matter"
