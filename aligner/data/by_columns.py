"""Formatters that `auto` finds by a row's columns: TRL's dataset types, ShareGPT, LLaVA, Alpaca, PKU-SafeRLHF and their kin."""

from __future__ import annotations

from typing import Any

from aligner.data.conversations import assistant, marked, media_in, messages_of, place_media, split_prompt, system_of, user
from aligner.data.formatters import formatter
from aligner.data.samples import (
    Answers,
    Bad,
    Document,
    Preference,
    Prompt,
    Ranked,
    Stepwise,
    Supervised,
    Triple,
    TwoSided,
    Unpaired,
    is_conversation,
)

# --- pairs and rankings ----------------------------------------------------------------------------------------------------------


@formatter("trl", needs=("chosen", "rejected"))
def trl(row: dict[str, Any]) -> Preference:
    """TRL's preference rows: `prompt, chosen, rejected` as strings or messages, or without a prompt; with `images` or `image`.

    Plain strings stay plain text (no chat template), also with images where the prompt says `<image>`. A plain prompt with images
    and no such mark is a user's message: nothing else could hold the picture.
    """
    prompt, chosen, rejected, media = row.get("prompt"), row["chosen"], row["rejected"], media_in(row)
    margin = float(row.get("margin") or 0)
    if chosen is None or rejected is None:
        raise Bad("missing column", "chosen or rejected is empty")
    if all(isinstance(text, str) for text in (chosen, rejected)) and (prompt is None or isinstance(prompt, str)):
        if prompt is None:
            prompt, chosen, rejected = split_prompt(chosen, rejected)
        if media and not marked(prompt):
            return Preference(place_media([user(prompt)], media), [assistant(chosen)], [assistant(rejected)], margin)
        return Preference(place_media(prompt, media), chosen, rejected, margin)
    chosen, rejected = messages_of(chosen), messages_of(rejected)
    if prompt is None or (isinstance(prompt, str) and chosen and chosen[0]["role"] != "assistant"):  # whole conversations
        prompt, chosen, rejected = split_prompt(chosen, rejected)
    else:
        prompt = messages_of(prompt, role="user")
    return Preference(place_media(prompt, media), chosen, rejected, margin)


@formatter("rlaif_v", needs=("image", "question", "chosen", "rejected"))
@formatter("question", needs=("question", "chosen", "rejected"))
def question(row: dict[str, Any]) -> Preference:
    """RLAIF-V's keys: `question, chosen, rejected` as strings, with `image` (or `images`) and `system` where there are any."""
    system = system_of(row)
    prompt = place_media(system + messages_of(row["question"], role="user"), media_in(row))
    return Preference(prompt, messages_of(row["chosen"]), messages_of(row["rejected"]))


@formatter("sharegpt", needs=("conversations", "chosen", "rejected"))
def sharegpt(row: dict[str, Any]) -> Preference:
    """ShareGPT pairs: `conversations` is the prompt, `chosen` and `rejected` are one message each; from/value or role/content.

    Where the answers are whole conversations, `conversations` is a copy of one of them and they say themselves what the prompt is.
    """
    if messages_of(row["chosen"])[0]["role"] != "assistant":
        return trl(row)
    if messages_of(row["conversations"])[-1]["role"] == "assistant":
        raise Bad("unexpected value", "the prompt in `conversations` ends with an answer")
    system = system_of(row)
    prompt = place_media(system + messages_of(row["conversations"]), media_in(row))
    return Preference(prompt, messages_of(row["chosen"]), messages_of(row["rejected"]))


@formatter("llava_ranked", needs=("conversations",), makes=Ranked)
def llava_ranked(row: dict[str, Any]) -> Ranked:
    """LLaVA conversations whose last answer is a list of answers, best first; `image` is a name or a list of names."""
    *turns, last = row["conversations"]
    answers = last["value"] if "value" in last else last["content"]
    if isinstance(answers, str) or len(answers) < 2:
        raise Bad("no ranked answers", "the last message holds one answer; a list of at least two, best first, is needed")
    return Ranked(place_media(messages_of(turns), media_in(row)), tuple([assistant(answer)] for answer in answers))


@formatter("safe_rlhf", needs=("prompt", "response_0", "response_1", "better_response_id"))
def safe_rlhf(row: dict[str, Any]) -> Preference:
    """PKU-SafeRLHF's keys: the more helpful of two responses is chosen."""
    return _safe_rlhf(row, row["better_response_id"])


@formatter("safe_rlhf_cost", needs=("prompt", "response_0", "response_1", "safer_response_id"))  # `auto` prefers the one above
def safe_rlhf_cost(row: dict[str, Any]) -> Preference:
    """PKU-SafeRLHF's keys for a cost model: the safer of two responses is chosen, and each says whether it is safe."""
    return _safe_rlhf(row, row["safer_response_id"])


def _safe_rlhf(row: dict[str, Any], chosen: int) -> Preference:
    if chosen not in (0, 1):
        raise Bad("unexpected value", f"the id of the chosen response is {chosen!r}, neither 0 nor 1")
    order = (int(chosen), 1 - int(chosen))
    safe = tuple(0 if row.get(f"is_response_{i}_safe") is None else 1 if row[f"is_response_{i}_safe"] else -1 for i in order)
    answers = ([assistant(row[f"response_{i}"])] for i in order)
    return Preference(place_media(messages_of(row["prompt"], role="user"), media_in(row)), *answers, safe=safe)


@formatter("language_feedback", needs=("prompt", "response", "refinement"))
def language_feedback(row: dict[str, Any]) -> Preference:
    """A response and what it became after a critique: the refinement is preferred to the response."""
    prompt = place_media(messages_of(row["prompt"], role="user"), media_in(row))
    return Preference(prompt, messages_of(row["refinement"]), messages_of(row["response"]))


@formatter("spin", needs=("real", "generated"))
def spin(row: dict[str, Any]) -> Preference:
    """Self-play pairs (SPIN, arXiv 2401.01335): `real` of the dataset is preferred to what the model `generated`."""
    return trl({**row, "chosen": row["real"], "rejected": row["generated"]})


@formatter("sso", needs=("p_system", "n_system", "chosen", "rejected", "raw"), makes=TwoSided)
def sso(row: dict[str, Any]) -> TwoSided:
    """AutoAlign's keys for SSO: under the good principle `p_system` chosen is preferred to rejected, under the bad one `n_system` `raw`
    to chosen. All three are whole conversations that differ in their last message."""
    answers = {name: messages_of(row[name])[-1:] for name in ("chosen", "rejected", "raw")}
    turns = place_media(messages_of(row["chosen"])[:-1], media_in(row))
    good, bad = ([{"role": "system", "content": row[name]}] * bool(row[name]) + turns for name in ("p_system", "n_system"))
    return TwoSided(Preference(good, answers["chosen"], answers["rejected"]), Preference(bad, answers["raw"], answers["chosen"]))


@formatter("tpo", needs=("chosen", "rejected", "reference"), makes=Triple)
def tpo(row: dict[str, Any]) -> Triple:
    """TRL's rows for TPO: a pair, and the gold answer to the same prompt in `reference`. Without `prompt` all three are whole texts."""
    pair, gold = trl(row), row["reference"]
    if row.get("prompt") is None:
        chosen, rejected, gold = (x if isinstance(x, str) else messages_of(x) for x in (row["chosen"], row["rejected"], gold))
        prompt = split_prompt(chosen, rejected)[0]
        if gold[: len(prompt)] != prompt:
            raise Bad("no shared prompt", "`reference` does not begin with what chosen and rejected begin with; a column `prompt` says it")
        gold = gold[len(prompt) :]
    return Triple(pair, messages_of(gold) if is_conversation(pair.chosen) else gold)


@formatter("scores", needs=("prompt", "completions", "scores"), makes=Ranked)
@formatter("score", needs=("prompt", "completion", "score"), makes=Ranked)
def scores(row: dict[str, Any]) -> Ranked:
    """`prompt` with `completions` and their `scores`, or one `completion` and its `score`; a user's message and the assistant's.

    In the row's order, by which `aligner.score` writes what each is worth.
    """
    answers = row["completions"] if "completions" in row else [row["completion"]]
    given = row["scores"] if "scores" in row else [row["score"]]
    prompt = place_media(messages_of(row["prompt"], role="user"), media_in(row))
    if len(answers) != len(given):
        raise Bad("no scores", f"there are {len(given)} scores for {len(answers)} answers")
    return Ranked(prompt, tuple(map(messages_of, answers)), tuple(map(float, given)))


@formatter("answers", needs=("prompt", "completions", "completion_lengths", "stopped"), makes=Answers)
def answers(row: dict[str, Any]) -> Answers:
    """What `python -m aligner.generate` writes: `prompt` as it was answered, plain text or messages, and the answers in `completions`."""
    if row.get("completions") is None:
        raise Bad("not answered", row.get("not_answered") or "")
    prompt = prompt_only(row).prompt
    return Answers(prompt, tuple([assistant(text)] if is_conversation(prompt) else text for text in row["completions"]))


# --- judged answers --------------------------------------------------------------------------------------------------------------


@formatter("unpaired", needs=("prompt", "completion", "label"), makes=Unpaired)
def unpaired(row: dict[str, Any]) -> Unpaired:
    """TRL's unpaired preferences: `prompt, completion` as strings or messages, and a `label` that is true or false."""
    sample = prompt_completion(row)
    return Unpaired(sample.prompt, sample.conversation, row["label"])


@formatter("labelled_messages", needs=("messages", "label"), makes=Unpaired)
@formatter("labelled_conversations", needs=("conversations", "label"), makes=Unpaired)
def labelled_messages(row: dict[str, Any]) -> Unpaired:
    """A conversation whose last message, the assistant's, a `label` calls good (true) or bad (false)."""
    conversation = _conversation(row)
    if conversation[-1]["role"] != "assistant":
        raise Bad("unexpected value", "the labelled conversation does not end with the assistant's message")
    return Unpaired(conversation[:-1], conversation[-1:], row["label"])


# --- what is imitated ------------------------------------------------------------------------------------------------------------


@formatter("messages", needs=("messages",), makes=Supervised)
@formatter("conversations", needs=("conversations",), makes=Supervised)
def messages(row: dict[str, Any]) -> Supervised:
    """Whole conversations: `messages` or ShareGPT's `conversations`, with `system` and images where there are any."""
    return Supervised(_conversation(row))


def _conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    system = system_of(row)
    found = row["messages"] if row.get("messages") is not None else row["conversations"]
    return place_media(system + messages_of(found), media_in(row))


@formatter("prompt_completion", needs=("prompt", "completion"), makes=Supervised)
def prompt_completion(row: dict[str, Any]) -> Supervised:
    """TRL's `prompt, completion` as strings (plain text, no chat template) or messages."""
    prompt, completion, media = row["prompt"], row["completion"], media_in(row)
    if isinstance(prompt, str) and isinstance(completion, str):
        if media and not marked(prompt):
            return Supervised([assistant(completion)], place_media([user(prompt)], media))
        return Supervised(completion, place_media(prompt, media))
    return Supervised(messages_of(completion), place_media(messages_of(prompt, role="user"), media))


@formatter("prompt_response", needs=("prompt", "response"), makes=Supervised)
def prompt_response(row: dict[str, Any]) -> Supervised:
    """`prompt` and `response`, a user's and the assistant's message; with images where there are any."""
    return Supervised(messages_of(row["response"]), place_media(messages_of(row["prompt"], role="user"), media_in(row)))


@formatter("question_answer", needs=("question", "answer"), makes=Supervised)
def question_answer(row: dict[str, Any]) -> Supervised:
    """`question` and `answer`, as GSM8K has them; with images where there are any."""
    return prompt_response({**row, "prompt": row["question"], "response": row["answer"]})


@formatter("alpaca", needs=("instruction", "output"), makes=Supervised)
def alpaca(row: dict[str, Any]) -> Supervised:
    """Alpaca's keys: `instruction`, more of it in `input` where there is any, `output`; and `system`."""
    text = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
    system = system_of(row)
    return Supervised([assistant(row["output"])], place_media([*system, user(text)], media_in(row)))


@formatter("aligner", needs=("question", "answer", "correction"), makes=Supervised)
def aligner(row: dict[str, Any]) -> Supervised:
    """Aligner's keys (arXiv 2402.02416): given a question and an answer to it, the correction is what is learned."""
    pair = f"{row['question']} | {row['answer']}"
    text = f"Edit the following Question-Answer pair to make it more helpful and harmless: {pair}"
    return Supervised([assistant(row["correction"])], place_media([user(text)], media_in(row)))


@formatter("text", needs=("text",), makes=Document)
def text(row: dict[str, Any]) -> Document:
    """Plain text in the column `text`: a document."""
    return Document(place_media(row["text"], media_in(row)))


# --- TRL's other types -----------------------------------------------------------------------------------------------------------


@formatter("prompt_only", needs=("prompt",), makes=Prompt)
def prompt_only(row: dict[str, Any]) -> Prompt:
    """TRL's `prompt` as a string or messages, with what rewards compare an answer to in `ground_truth`, `solution` or `answer`."""
    prompt, media = row["prompt"], media_in(row)
    if isinstance(prompt, str) and media and not marked(prompt):
        prompt = [user(prompt)]
    if not isinstance(prompt, str):
        prompt = messages_of(prompt, role="user")
    truth = next((row[key] for key in ("ground_truth", "solution", "answer") if row.get(key) is not None), None)
    return Prompt(place_media(prompt, media), truth)


@formatter("stepwise", needs=("prompt", "completions", "labels"), makes=Stepwise)
def stepwise(row: dict[str, Any]) -> Stepwise:
    """TRL's stepwise supervision: `prompt`, the steps of an answer in `completions`, and in `labels` whether each is right."""
    steps, labels = tuple(row["completions"]), tuple(map(bool, row["labels"]))
    if len(steps) != len(labels):
        raise Bad("no label", f"there are {len(labels)} labels for {len(steps)} steps")
    return Stepwise(row["prompt"], steps, labels)
