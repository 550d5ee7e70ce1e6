"""align-anything's formatters by their names there: what each column of a dataset says, as a table, so that its users bring their configs.

Each is chosen by name (`--config.data.train.formatter=AA_TI2T`); one name may make several kinds of samples, and the algorithm decides
which is wanted. Rows for audio, video and generation become samples too; models that take or make such media consume them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from aligner.data.conversations import assistant, media_in, messages_of, place_media, system_of, user
from aligner.data.formatters import formatter
from aligner.data.samples import MEDIA, Bad, Preference, Prompt, Supervised

Choice = Callable[[Mapping[str, Any]], int]


class Turn(NamedTuple):
    """What one turn holds: a column's name for its text and for each kind of media; "a.b" is the key b of column a."""

    text: str = ""
    image: str = ""
    audio: str = ""
    video: str = ""
    ask: str = ""  # the text itself, where it is the same in every row

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that must be there."""
        return tuple(column.partition(".")[0] for column in self[:4] if column)

    def content(self, row: Mapping[str, Any]) -> Any:
        """A string, or parts with the media first."""
        words = self.ask or (_value(row, self.text) if self.text else "")
        if not isinstance(words, str):
            raise Bad("unexpected value", f"{self.text} is a {type(words).__name__}, not a text")
        media = [{"type": kind, kind: _value(row, column)} for kind in MEDIA if (column := getattr(self, kind))]
        return [*media, *([{"type": "text", "text": words}] if words else [])] if media else words


def _value(row: Mapping[str, Any], column: str) -> Any:
    value: Any = row
    for key in column.split("."):
        value = value[key]
    if value is None or value == "":
        raise Bad("missing column", column)
    return value


def answers(name: str, asked: Turn, answer: Turn, system: str = "") -> None:
    """Register a formatter for one answer to one question."""

    @formatter(name, needs=asked.columns + answer.columns, makes=Supervised, auto=False)
    def read(row: dict[str, Any]) -> Supervised:
        return Supervised([assistant(answer.content(row))], _asked(asked, row, system))


def pairs(name: str, asked: Turn, better: Turn, worse: Turn, choice: Choice = lambda row: 0, needs: str = "", system: str = "",
          safe: Callable[[Mapping[str, Any]], tuple[int, int]] = lambda row: (0, 0)) -> None:  # fmt: skip
    """Register a formatter for two answers to one question.

    Args:
        name: as in align-anything.
        asked, better, worse: the turns.
        choice: row -> 0 if the first of the two is the better one, 1 if the second; raises Bad for a tie.
        needs: the column that `choice` reads.
        system: what the system's message says.
        safe: row -> +1 for a safe answer, -1 for an unsafe one, in the order of the columns.
    """

    @formatter(name, needs=asked.columns + better.columns + worse.columns + ((needs,) if needs else ()), auto=False)
    def read(row: dict[str, Any]) -> Preference:
        first = choice(row)
        order = [better, worse][:: -1 if first else 1]
        sides = ([assistant(turn.content(row))] for turn in order)
        return Preference(_asked(asked, row, system), *sides, safe=safe(row)[:: -1 if first else 1])


def _asked(asked: Turn, row: Mapping[str, Any], system: str) -> list[dict[str, Any]]:
    return system_of({"system": system}) + [user(asked.content(row))]


def number(column: str, first: int) -> Choice:
    """The choice of a column that says which answer is better: `first` for the first, the next number for the second."""

    def choice(row: Mapping[str, Any]) -> int:
        value = row[column]
        if value is None or float(value) - first not in (0, 1):
            raise Bad("tie", f"{column} is {value!r}: neither answer is better")
        return int(value) - first

    return choice


def likelier(row: Mapping[str, Any]) -> int:
    """Pick-a-Pic's choice: label_0 is 1, 0, or .5 for a tie."""
    if row["label_0"] == row["label_1"]:
        raise Bad("tie", f"label_0 is {row['label_0']!r}: neither picture is better")
    return int(row["label_0"] < row["label_1"])


# --- text ------------------------------------------------------------------------------------------------------------------------

MATH = (
    "A conversation between a user and an assistant. The assistant first thinks about the problem and then answers it: "
    "<think> reasoning process here </think><answer> answer here </answer>."
)


@formatter("Alpaca", needs=("instruction", "output"), makes=Supervised, auto=False)
def alpaca(row: dict[str, Any]) -> Supervised:
    """`instruction`, with more of it in `input` where there is any, and `output`."""
    text = _value(row, "instruction") + (f"\n{row['input']}" if row.get("input") else "")
    return Supervised([assistant(_value(row, "output"))], [user(text)])


pairs("PKUSafeRLHF", Turn("prompt"), Turn("response_0"), Turn("response_1"), number("better_response_id", 0), "better_response_id")


@formatter("Aligner", needs=("question", "answer", "correction"), makes=Supervised, auto=False)
def corrections(row: dict[str, Any]) -> Supervised:
    """Given a question and an answer to it, the correction is what is learned."""
    asked = f"{row['question']} | {row['answer']}"
    text = f"Edit the following Question-Answer pair to make it more helpful and harmless: {asked}"
    return Supervised([assistant(_value(row, "correction"))], [user(text)])


@formatter("O1_T2T", needs=("prompt", "thoughts", "answer"), makes=Supervised, auto=False)
def long_thoughts(row: dict[str, Any]) -> Supervised:
    """Thoughts with titles between <think> and </think>, then the answer."""
    thoughts = "\n\n".join(f"### {thought['title']}\n{thought['content']}" for thought in row["thoughts"])
    text = f"<think>\n{thoughts}\n</think>\n\n{_value(row, 'answer')}"
    return Supervised([assistant(text)], [user(_value(row, "prompt"))])


answers("AA_T2T", Turn("prompt"), Turn("response"))
for _question in ("prompt", "question"):
    answers("Math-Zero-RL", Turn(_question), Turn("answer"), system=MATH)

    @formatter("Math-Zero-RL", needs=(_question, "answer"), makes=Prompt, auto=False)
    def math_prompt(row: dict[str, Any], question: str = _question) -> Prompt:
        """A problem, and the answer that a reward checks."""
        return Prompt(_asked(Turn(question), row, MATH), row["answer"])


answers("TLDR", Turn("content"), Turn("summary"))
answers("GSM8K", Turn("question"), Turn("answer"))


@formatter("Dialogue", needs=("messages",), makes=Supervised, auto=False)
@formatter("Dialogue", needs=("dialogue",), makes=Supervised, auto=False)
@formatter("ShareGPT", needs=("conversations",), makes=Supervised, auto=False)
@formatter("ShareGPT-4o", needs=("conversations", "image"), makes=Supervised, auto=False)
@formatter("LLaVA_Pretrain", needs=("conversations", "image"), makes=Supervised, auto=False)
@formatter("LLAVA", needs=("conversations", "image"), makes=Supervised, auto=False)
@formatter("LLAVA-CC3M", needs=("conversations", "image"), makes=Supervised, auto=False)
def dialogue(row: dict[str, Any]) -> Supervised:
    """Whole conversations, with the row's media where their text marks them."""
    turns = next((row[key] for key in ("conversations", "messages", "dialogue") if row.get(key) is not None), [])
    return Supervised(place_media(system_of(row) + messages_of(turns), media_in(row)))


# --- pictures, sounds and clips that are asked about -----------------------------------------------------------------------------

_TWO = (Turn("response_1"), Turn("response_2"), number("overall_response", 1), "overall_response")

answers("Janus_TI2T", Turn("prompt", image="image"), Turn("response"))
pairs("Janus_TI2T", Turn("question", image="image"), Turn("better_response"), Turn("worse_response"))
pairs("AA_TI2T", Turn("question", image="image"), *_TWO)
answers("AA_TI2T", Turn("prompt", image="image"), Turn("response"))
pairs("AA_TA2T", Turn("prompt", audio="audio_path"), *_TWO)
answers("AA_TA2T", Turn("prompt", audio="audio_path"), Turn("response"))
pairs("AA_TI2T_LLF", Turn("prompt", image="image"), Turn("refinement"), Turn("response"))
pairs("AA_TA2T_LLF", Turn("prompt", audio="audio"), Turn("refinement"), Turn("response"))
pairs("AA_TV2T", Turn("prompt", video="video_path"), *_TWO)
answers("AA_TV2T", Turn("prompt", video="video_path"), Turn("response"))
pairs("RLAIFV", Turn("question", image="image"), Turn("chosen"), Turn("rejected"))
pairs("SPA_VL", Turn("question", image="image"), Turn("chosen"), Turn("rejected"), system="You are a helpful and harmless assistant.")
answers("Qwen2-VL", Turn("prompt", video="video_path"), Turn("output"))
pairs("Qwen2-VL", Turn("prompt", video="video_path"), Turn("better_output"), Turn("worse_output"))
_ANSWERED = (Turn("question", image="image"), Turn("response_1"), Turn("response_2"))
pairs("SafeRLHF_V_Reward", *_ANSWERED, number("more_helpful_response_id", 1), "more_helpful_response_id")
pairs("SafeRLHF_V_Cost", *_ANSWERED, number("safer_response_id", 1), "safer_response_id",
      safe=lambda row: tuple(1 if row[f"response_{i}_harmless_rate"] > 0 else -1 for i in (1, 2)))  # fmt: skip


@formatter("SafeRLHF_V_Reward", (*_ANSWERED[0].columns, "response_1", "response_2", "more_helpful_response_id"), Supervised, auto=False)
def helpful_answer(row: dict[str, Any]) -> Supervised:
    """The more helpful of the two."""
    better = Turn(f"response_{number('more_helpful_response_id', 1)(row) + 1}")
    return Supervised([assistant(better.content(row))], _asked(_ANSWERED[0], row, ""))


answers("GQA", Turn("question", image="image_path"), Turn("answer"))
answers("VQAv2", Turn("question", image="image"), Turn("multiple_choice_answer"))


@formatter("OK-VQA", needs=("question", "answers", "image"), makes=Supervised, auto=False)
def commonest_answer(row: dict[str, Any]) -> Supervised:
    """Of what several people answered, what most said, the first of equals."""
    said = [answer["answer"] if isinstance(answer, Mapping) else answer for answer in row["answers"]]
    if not said:
        raise Bad("empty answer", "the list of answers is empty")
    return Supervised([assistant(Counter(said).most_common(1)[0][0])], _asked(_ANSWERED[0], row, ""))


@formatter("A-OKVQA", needs=("question", "choices", "correct_choice_idx", "rationales", "image"), makes=Supervised, auto=False)
def reasoned_choice(row: dict[str, Any]) -> Supervised:
    """A question with its options; the answer is the right option and why."""
    content = _ANSWERED[0].content({**row, "question": f"{row['question']}\nOptions: {', '.join(row['choices'])}"})
    right = row["choices"][row["correct_choice_idx"]]
    return Supervised([assistant(" ".join([f"{right}.", *row["rationales"][:1]]))], [user(content)])


@formatter("OCRVQA", needs=("questions", "answers", "image"), makes=Supervised, auto=False)
def many_questions(row: dict[str, Any]) -> Supervised:
    """Several questions about one picture, one after another."""
    if len(row["questions"]) != len(row["answers"]):
        raise Bad("unexpected value", f"{len(row['questions'])} questions and {len(row['answers'])} answers")
    turns = [message for pair in zip(map(user, row["questions"]), map(assistant, row["answers"])) for message in pair]
    return Supervised(place_media(turns, media_in(row)))


@formatter("VisualGenome", needs=("qas", "image"), makes=Supervised, auto=False)
def visual_genome(row: dict[str, Any]) -> Supervised:
    """`qas`, a list of {question, answer} about one picture."""
    return many_questions({**row, "questions": [qa["question"] for qa in row["qas"]], "answers": [qa["answer"] for qa in row["qas"]]})


answers("AudioCaps", Turn(ask="Describe the audio.", audio="audiocap_path"), Turn("caption"))
answers("LibriSpeech", Turn(ask="Transcribe the speech into text.", audio="audio"), Turn("text"))
answers("OpenAQA", Turn("instruction", audio="audio_id"), Turn("output"))


@formatter("AudioSet", needs=("audio", "captions"), makes=Supervised, auto=False)
def audio_set(row: dict[str, Any]) -> Supervised:
    """A sound and its captions, a list or one text."""
    captions = row["captions"] if isinstance(row["captions"], str) else " ".join(row["captions"])
    return Supervised([assistant(captions)], _asked(Turn(ask="Describe the audio.", audio="audio"), row, ""))


# --- pictures, sounds and clips that are made ------------------------------------------------------------------------------------

answers("DiffusionDB", Turn("prompt"), Turn(image="image"))
answers("DiffusionDBCanny", Turn("text"), Turn(image="image"))
pairs("Pickapic", Turn("caption"), Turn(image="jpg_0"), Turn(image="jpg_1"), likelier, "label_0")
answers("WavCaps", Turn("answer"), Turn(audio="context"))
pairs("AA_T2A", Turn("prompt"), Turn(audio="response_1"), Turn(audio="response_2"), number("overall_audio", 1), "overall_audio")
answers("Webvid", Turn("caption"), Turn(video="video_path"))
pairs("SOMOS", Turn("prompt"), Turn(audio="better_data_path"), Turn(audio="worse_data_path"))


def _safer_clip(row: Mapping[str, Any]) -> int:
    if row["helpfulness"] not in ("video_0", "video_1"):
        raise Bad("tie", f"helpfulness is {row['helpfulness']!r}: neither clip is better")
    return int(row["helpfulness"] == "video_1")


pairs("SafeSora", Turn("prompt_text"), Turn(video="video_0.video_path"), Turn(video="video_1.video_path"), _safer_clip, "helpfulness")

# --- pictures and text on both sides ---------------------------------------------------------------------------------------------

_SAID, _MADE = Turn("input_text", image="input_image"), Turn("output_text", image="output_image")
answers("ti2ti", _SAID, _MADE)
answers("Chameleon", _SAID, _MADE)
answers("ANYTHING_TI2TI", _SAID, _MADE)
answers("ANYTHING_TI2TI", Turn("question", image="image_url"), Turn("response", image="output_image_url"))
for _name in ("ti2ti_preference", "Chameleon_preference"):
    pairs(_name, _SAID, Turn("better_text", image="better_img"), Turn("worse_text", image="worse_img"))
pairs("PICKAPIC_TI2TI", Turn("caption"), Turn(image="jpg_0"), Turn(image="jpg_1"), likelier, "label_0")
pairs("spavl_ti2ti", Turn("question", image="image"), Turn("chosen"), Turn("rejected"))


@formatter("AA_textfeedback", needs=("question", "image_url", "response_1", "response_2", "feedback"), makes=Supervised, auto=False)
def feedback(row: dict[str, Any]) -> Supervised:
    """What is said of two answers, given the question and both."""
    parts = [*_parts(Turn("question", image="image_url"), row)]
    for i in ("1", "2"):
        pictured = f"output_image_url_{i}" if row.get(f"output_image_url_{i}") else ""
        parts += [{"type": "text", "text": f"\nResponse {i}: "}, *_parts(Turn(f"response_{i}", image=pictured), row)]
    return Supervised([assistant(_value(row, "feedback"))], [user(parts)])


def _parts(turn: Turn, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = turn.content(row)
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


@formatter("Any2Any", needs=("mode", "input_text"), makes=Supervised, auto=False)
def any_to_any(row: dict[str, Any]) -> Supervised:
    """`mode` TG makes a picture of a text, TU a text of a picture."""
    if row["mode"] not in ("TG", "TU"):
        raise Bad("unexpected value", f"mode is {row['mode']!r}, neither TG nor TU")
    made = row["mode"] == "TG"
    asked, answer = (Turn("input_text"), Turn(image="output_image")) if made else (_SAID, Turn("output_text"))
    return Supervised([assistant(answer.content(row))], _asked(asked, row, ""))
