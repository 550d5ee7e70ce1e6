"""Every formatter of align-anything, by its name there: a row as its dataset has it, and the sample that it means."""

import pytest

from aligner.data.by_name import MATH
from aligner.data.formatters import find_formatter, known
from aligner.data.kinds import ENCODERS
from aligner.data.samples import Bad, Preference, Prompt, Supervised, as_prompt


def message(role, *parts):
    content = parts[0] if len(parts) == 1 and isinstance(parts[0], str) else [p if isinstance(p, dict) else text(p) for p in parts]
    return {"role": role, "content": content}


def text(words):
    return {"type": "text", "text": words}


def image(reference):
    return {"type": "image", "image": reference}


def audio(reference):
    return {"type": "audio", "audio": reference}


def video(reference):
    return {"type": "video", "video": reference}


def one(asked, answer, system=None):
    """An answer to a question; each the parts of a message."""
    return Supervised([message("assistant", *answer)], [*([message("system", system)] if system else []), message("user", *asked)])


def two(asked, better, worse, system=None, safe=(0, 0)):
    prompt = one(asked, better, system).prompt
    return Preference(prompt, [message("assistant", *better)], [message("assistant", *worse)], safe=safe)


SOUND = {"array": [0.0, 0.5], "sampling_rate": 48000}
PICTURE = {"bytes": b"\x89PNG", "path": None}
OTHER = {"bytes": b"\xff\xd8", "path": None}
HUMAN, GPT = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}
TALK = Supervised([message("user", image("1.jpg"), "What is it?"), message("assistant", text("A cat."))])
TWO = {"response_1": "a", "response_2": "b"}
SAFER = {"question": "q", "image": PICTURE, **TWO, "more_helpful_response_id": 2, "safer_response_id": 1,
         "response_1_harmless_rate": 0.8, "response_2_harmless_rate": -0.3}  # fmt: skip
SIDES = {"input_text": "in", "input_image": "1.png", "output_text": "out", "output_image": "2.png"}
PREFERRED = {"input_text": "in", "input_image": "1.png", "better_text": "b", "better_img": "b.png", "worse_text": "w", "worse_img": "w.png"}
PICK = {"caption": "a fox", "jpg_0": b"0", "jpg_1": b"1", "label_0": 0, "label_1": 1}

ROWS = [
    ("Alpaca", {"instruction": "Translate.", "input": "chat", "output": "cat"}, one(["Translate.\nchat"], ["cat"])),
    ("Alpaca", {"instruction": "Count.", "input": "", "output": "one"}, one(["Count."], ["one"])),
    ("PKUSafeRLHF", {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0},
     two(["q"], ["b"], ["a"])),
    ("Aligner", {"question": "q", "answer": "a", "correction": "c"},
     one(["Edit the following Question-Answer pair to make it more helpful and harmless: q | a"], ["c"])),
    ("O1_T2T", {"prompt": "q", "thoughts": [{"title": "First", "content": "x"}, {"title": "Then", "content": "y"}], "answer": "a"},
     one(["q"], ["<think>\n### First\nx\n\n### Then\ny\n</think>\n\na"])),
    ("AA_T2T", {"prompt": "q", "response": "a"}, one(["q"], ["a"])),
    ("Math-Zero-RL", {"question": "1+1", "answer": "2"}, one(["1+1"], ["2"], MATH)),
    ("Math-Zero-RL", {"prompt": "1+1", "answer": "2"}, Prompt(one(["1+1"], ["2"], MATH).prompt, "2")),
    ("TLDR", {"content": "A long post.", "summary": "A post."}, one(["A long post."], ["A post."])),
    ("GSM8K", {"question": "1+1", "answer": "It is <<1+1=2>>2.\n#### 2"}, one(["1+1"], ["It is <<1+1=2>>2.\n#### 2"])),
    ("Janus_TI2T", {"prompt": "q", "response": "a", "image": "1.png"}, one([image("1.png"), "q"], ["a"])),
    ("Janus_TI2T", {"question": "q", "better_response": "a", "worse_response": "b", "image": "1.png"},
     two([image("1.png"), "q"], ["a"], ["b"])),
    ("AA_TI2T", {"question": "q", "image": PICTURE, **TWO, "overall_response": 2}, two([image(PICTURE), "q"], ["b"], ["a"])),
    ("AA_TI2T", {"prompt": "q", "image": PICTURE, "response": "a"}, one([image(PICTURE), "q"], ["a"])),
    ("AA_TA2T", {"prompt": "q", "audio_path": SOUND, **TWO, "overall_response": 1}, two([audio(SOUND), "q"], ["a"], ["b"])),
    ("AA_TA2T", {"prompt": "q", "audio_path": SOUND, "response": "a"}, one([audio(SOUND), "q"], ["a"])),
    ("AA_TA2T_LLF", {"prompt": "q", "audio": SOUND, "response": "b", "refinement": "a"}, two([audio(SOUND), "q"], ["a"], ["b"])),
    ("AA_TI2T_LLF", {"prompt": "q", "image": "iVBORw0KGgo=", "response": "b", "refinement": "a"},
     two([image("iVBORw0KGgo="), "q"], ["a"], ["b"])),
    ("AA_TV2T", {"prompt": "q", "video_path": "1.mp4", **TWO, "overall_response": 1}, two([video("1.mp4"), "q"], ["a"], ["b"])),
    ("AA_TV2T", {"prompt": "q", "video_path": "1.mp4", "response": "a"}, one([video("1.mp4"), "q"], ["a"])),
    ("DiffusionDB", {"prompt": "a fox", "image": PICTURE}, one(["a fox"], [image(PICTURE)])),
    ("DiffusionDBCanny", {"text": "a fox", "image": PICTURE}, one(["a fox"], [image(PICTURE)])),
    ("Pickapic", PICK, two(["a fox"], [image(b"1")], [image(b"0")])),
    ("WavCaps", {"answer": "rain", "context": SOUND}, one(["rain"], [audio(SOUND)])),
    ("AA_T2A", {"prompt": "rain", "response_1": SOUND, "response_2": "2.wav", "overall_audio": 2},
     two(["rain"], [audio("2.wav")], [audio(SOUND)])),
    ("Webvid", {"caption": "a walk", "video_path": "1.mp4"}, one(["a walk"], [video("1.mp4")])),
    ("SafeSora", {"prompt_text": "a walk", "video_0": {"video_path": "0.mp4"}, "video_1": {"video_path": "1.mp4"}, "helpfulness": "video_1"},
     two(["a walk"], [video("1.mp4")], [video("0.mp4")])),
    ("SOMOS", {"prompt": "say it", "better_data_path": "b.wav", "worse_data_path": "w.wav"},
     two(["say it"], [audio("b.wav")], [audio("w.wav")])),
    ("ti2ti", SIDES, one([image("1.png"), "in"], [image("2.png"), "out"])),
    ("Chameleon", SIDES, one([image("1.png"), "in"], [image("2.png"), "out"])),
    ("ANYTHING_TI2TI", SIDES, one([image("1.png"), "in"], [image("2.png"), "out"])),
    ("ANYTHING_TI2TI", {"question": "q", "response": "a", "image_url": "1.png", "output_image_url": "2.png"},
     one([image("1.png"), "q"], [image("2.png"), "a"])),
    ("ti2ti_preference", PREFERRED, two([image("1.png"), "in"], [image("b.png"), "b"], [image("w.png"), "w"])),
    ("Chameleon_preference", PREFERRED, two([image("1.png"), "in"], [image("b.png"), "b"], [image("w.png"), "w"])),
    ("PICKAPIC_TI2TI", PICK | {"label_0": 1, "label_1": 0}, two(["a fox"], [image(b"0")], [image(b"1")])),
    ("spavl_ti2ti", {"question": "q", "image": PICTURE, "chosen": "a", "rejected": "b"}, two([image(PICTURE), "q"], ["a"], ["b"])),
    ("AA_textfeedback", {"question": "q", "image_url": "1.png", **TWO, "output_image_url_1": "2.png", "output_image_url_2": None,
                         "feedback": "The first."},
     one([image("1.png"), "q", "\nResponse 1: ", image("2.png"), "a", "\nResponse 2: ", "b"], ["The first."])),
    ("Any2Any", {"mode": "TG", "input_text": "a fox", "output_image": "1.png"}, one(["a fox"], [image("1.png")])),
    ("Any2Any", {"mode": "TU", "input_text": "what?", "input_image": "1.png", "output_text": "a fox"},
     one([image("1.png"), "what?"], ["a fox"])),
    ("GQA", {"question": "q", "answer": "yes", "image_path": "1.jpg"}, one([image("1.jpg"), "q"], ["yes"])),
    ("OK-VQA", {"question": "q", "answers": [{"answer": "dog"}, {"answer": "cat"}, {"answer": "cat"}], "image": PICTURE},
     one([image(PICTURE), "q"], ["cat"])),
    ("A-OKVQA", {"question": "q", "choices": ["x", "y"], "correct_choice_idx": 1, "rationales": ["It is so.", "Or so."], "image": PICTURE},
     one([image(PICTURE), "q\nOptions: x, y"], ["y. It is so."])),
    ("OCRVQA", {"questions": ["q", "r"], "answers": ["a", "b"], "image": PICTURE},
     Supervised([message("user", image(PICTURE), "q"), message("assistant", text("a")), message("user", text("r")),
                 message("assistant", text("b"))])),
    ("VisualGenome", {"qas": [{"question": "q", "answer": "a"}], "image": PICTURE},
     Supervised([message("user", image(PICTURE), "q"), message("assistant", text("a"))])),
    ("ShareGPT-4o", {"conversations": [HUMAN, GPT], "image": "1.jpg"}, TALK),
    ("AudioCaps", {"caption": "a dog barks", "audiocap_path": "1.wav"}, one([audio("1.wav"), "Describe the audio."], ["a dog barks"])),
    ("LibriSpeech", {"audio": SOUND, "text": "HELLO"}, one([audio(SOUND), "Transcribe the speech into text."], ["HELLO"])),
    ("AudioSet", {"audio": SOUND, "captions": ["rain", "wind"]}, one([audio(SOUND), "Describe the audio."], ["rain wind"])),
    ("OpenAQA", {"instruction": "q", "audio_id": "1.flac", "output": "a"}, one([audio("1.flac"), "q"], ["a"])),
    ("RLAIFV", {"question": "q", "image": PICTURE, "chosen": "a", "rejected": "b"}, two([image(PICTURE), "q"], ["a"], ["b"])),
    ("SPA_VL", {"question": "q", "image": PICTURE, "chosen": "a", "rejected": "b"},
     two([image(PICTURE), "q"], ["a"], ["b"], "You are a helpful and harmless assistant.")),
    ("Qwen2-VL", {"prompt": "q", "output": "a", "video_path": "1.mp4"}, one([video("1.mp4"), "q"], ["a"])),
    ("Qwen2-VL", {"prompt": "q", "better_output": "a", "worse_output": "b", "video_path": "1.mp4"},
     two([video("1.mp4"), "q"], ["a"], ["b"])),
    ("SafeRLHF_V_Reward", SAFER, two([image(PICTURE), "q"], ["b"], ["a"])),
    ("SafeRLHF_V_Reward", SAFER, one([image(PICTURE), "q"], ["b"])),
    ("SafeRLHF_V_Cost", SAFER, two([image(PICTURE), "q"], ["a"], ["b"], safe=(1, -1))),
    ("SafeRLHF_V_Cost", SAFER | {"safer_response_id": 2}, two([image(PICTURE), "q"], ["b"], ["a"], safe=(-1, 1))),
    ("LLaVA_Pretrain", {"conversations": [HUMAN, GPT], "image": "1.jpg"}, TALK),
    # of August 2024
    ("Dialogue", {"messages": [message("user", "q"), message("assistant", "a")]}, Supervised([message("user", "q"), message("assistant", "a")])),
    ("ShareGPT", {"conversations": [{"from": "human", "value": "q"}, GPT]}, Supervised([message("user", "q"), message("assistant", "A cat.")])),
    ("VQAv2", {"question": "q", "image": PICTURE, "multiple_choice_answer": "yes"}, one([image(PICTURE), "q"], ["yes"])),
    ("LLAVA", {"conversations": [HUMAN, GPT], "image": "1.jpg"}, TALK),
    ("LLAVA-CC3M", {"conversations": [HUMAN, GPT], "image": "1.jpg"}, TALK),
]  # fmt: skip

NAMES = """
Alpaca PKUSafeRLHF Aligner O1_T2T AA_T2T Math-Zero-RL TLDR GSM8K Janus_TI2T AA_TI2T AA_TA2T AA_TA2T_LLF AA_TI2T_LLF AA_TV2T
DiffusionDB DiffusionDBCanny Pickapic WavCaps AA_T2A Webvid SafeSora SOMOS ti2ti Chameleon ANYTHING_TI2TI ti2ti_preference
Chameleon_preference PICKAPIC_TI2TI spavl_ti2ti AA_textfeedback Any2Any GQA OK-VQA A-OKVQA OCRVQA VisualGenome ShareGPT-4o
AudioCaps LibriSpeech AudioSet OpenAQA RLAIFV SPA_VL Qwen2-VL SafeRLHF_V_Reward SafeRLHF_V_Cost LLaVA_Pretrain Dialogue ShareGPT
VQAv2 LLAVA LLAVA-CC3M
"""


@pytest.mark.parametrize(("name", "row", "expected"), ROWS, ids=[f"{name}-{type(expected).__name__}" for name, _, expected in ROWS])
def test_a_row_becomes_the_sample_it_means(name, row, expected):
    found, to_sample = find_formatter(name, list(row), "data.train", (type(expected),))
    assert found == name and to_sample(row) == expected
    assert as_prompt(to_sample(row)).prompt, "every row can be asked again"


def test_every_name_is_there_and_has_a_row():
    names = set(NAMES.split())
    assert names == {row[0] for row in ROWS} and names <= set(known())


TIES = [
    ("Pickapic", PICK | {"label_0": 0.5, "label_1": 0.5}, "tie"),
    ("AA_TI2T", {"question": "q", "image": PICTURE, **TWO, "overall_response": 0}, "tie"),
    ("PKUSafeRLHF", {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": None}, "tie"),
    ("SafeSora", {"prompt_text": "a", "video_0": {"video_path": "0"}, "video_1": {"video_path": "1"}, "helpfulness": "tie"}, "tie"),
    ("SafeSora", {"prompt_text": "a", "video_0": {}, "video_1": {"video_path": "1"}, "helpfulness": "video_0"}, "missing column"),
    ("GQA", {"question": "q", "answer": "", "image_path": "1.jpg"}, "missing column"),
    ("OK-VQA", {"question": "q", "answers": [], "image": PICTURE}, "empty answer"),
    ("OCRVQA", {"questions": ["q", "r"], "answers": ["a"], "image": PICTURE}, "unexpected value"),
    ("Any2Any", {"mode": "??", "input_text": "in"}, "unexpected value"),
    ("GSM8K", {"question": ["q"], "answer": "a"}, "unexpected value"),
]


@pytest.mark.parametrize(("name", "row", "reason"), TIES, ids=[f"{name}-{reason}" for name, _, reason in TIES])
def test_ties_and_damaged_rows_are_counted_by_rule(name, row, reason):
    with pytest.raises(Bad) as caught:
        find_formatter(name, list(row), "data.train", (Preference, Supervised))[1](row)
    assert caught.value.reason == reason


def test_names_are_for_those_who_ask_for_them():
    takes = ENCODERS["preference"].takes
    assert find_formatter("auto", ["prompt", "response_0", "response_1", "better_response_id"], "data.train", takes)[0] == "safe_rlhf"
    assert find_formatter("PKUSafeRLHF", ["prompt", "response_0", "response_1", "better_response_id"], "data.train", takes)[0] == "PKUSafeRLHF"
