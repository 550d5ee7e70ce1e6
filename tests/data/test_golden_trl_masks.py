# ruff: noqa: RUF001
"""Masks against TRL's own training templates, all that the installed TRL has: many turns, a system's prompt, tools, empty turns."""

from tests.torch_required import torch  # isort: skip  # noqa: F401
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import trl

from aligner.data.samples import Bad, Supervised
from aligner.data.turns import encode_supervised
from tests.data import tiny
from tests.data.test_turns import TALK, assistant, mask, tokens, user

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.name.removesuffix("_training.jinja") for path in FOLDER.glob("*_training.jinja"))

SYSTEM = {"role": "system", "content": "Be brief."}
NUMBER = {"type": "integer", "description": "a number"}
TOOL = {"name": "multiply", "description": "The product.",
        "parameters": {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]}}  # fmt: skip
CALL = assistant("") | {"tool_calls": [{"type": "function", "function": {"name": "multiply", "arguments": {"a": 2, "b": 3}}}]}
RESULT = {"role": "tool", "name": "multiply", "content": "6"}
TALKS = {
    "one turn": (TALK[:2], {}),
    "two turns": (TALK, {}),
    "system": ([SYSTEM, *TALK], {}),
    "the user last": (TALK[:3], {}),
    "an empty answer": ([user("what is this"), assistant(""), user("and this?"), assistant("a dog")], {}),
    "an empty question": ([user(""), assistant("a cat"), user("and this?"), assistant("a dog")], {}),
    "tools": ([SYSTEM, user("2 * 3?"), CALL, RESULT, assistant("It is 6."), user("thanks"), assistant("yes")], {"tools": [TOOL]}),
    "tools, no call": ([user("hi"), assistant("a cat")], {"tools": [TOOL]}),
}
STRUCTURED = ("idefics3", "llava_next", "smolvlm")  # their contents are lists of parts

# Released templates without marks: TRL trains these first characters of a turn too, which the template's generation prompt writes.
HEADS = {
    "deepseek_r1_distill": "<｜Assistant｜>", "deepseekv3": "<｜Assistant｜>", "gptoss": "<|start|>assistant", "muse_glimmer": "<|start|>assistant",
    "nemotron_3_5_lightning": "<think>", "nemotron_3_nano": "<think>", "nemotron_3_super": "<think>", "nemotron_3_ultra": "<think>",
    "qwen2_5": "\n", "qwen3_8": "<think>\n",
}  # fmt: skip
# TRL's training template writes other text than the released one: past reasoning, or an end of turn.
REWRITTEN = ("glm4moe", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6")


def assets(name):
    """(released, marked by TRL): a tokenizer that has the template's special tokens, with each template."""
    from trl.chat_template_utils import get_training_chat_template

    released = (FOLDER / f"{name}.jinja").read_text()
    special = sorted(set(re.findall(r"<[|｜]?[\w▁/]+[|｜]?>|\[/?[A-Z_]+\]", released)))
    made = []
    for template in (released, None):
        tokenizer = tiny.tokenizer(template or released)
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        if template is None:
            tokenizer.chat_template = get_training_chat_template(tokenizer)
        processor = SimpleNamespace(chat_template=tokenizer.chat_template, image_token="<image>") if name in STRUCTURED else None
        made.append(SimpleNamespace(tokenizer=tokenizer, processor=processor))
    return made


def theirs(talk, options, marked):
    """(token ids, mask) as TRL has them, None where the template refuses the talk."""
    if marked.processor is not None:
        talk = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in talk]
    try:
        found = marked.tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True, **options)
    except Exception:  # a template may raise anything
        return None
    return found["input_ids"], np.array(found["assistant_masks"], bool)


def ours(talk, options, made):
    encoded = encode_supervised(Supervised(talk, template=options), made, None)
    return tokens(encoded).tolist(), mask(encoded)


def spans(trained):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(int), [0]])))
    return list(zip(edges[::2], edges[1::2]))


@pytest.mark.parametrize("name", NAMES)
def test_masks_equal_trl(name):
    released, marked = assets(name)
    seen = 0
    for title, (talk, options) in TALKS.items():
        expected = theirs(talk, options, marked)
        if expected is None:
            with pytest.raises(Bad, match="chat template"):
                ours(talk, options, marked)
            continue
        seen += 1
        if title == "tools" and "tool_calls" not in marked.tokenizer.chat_template:  # TRL trains the turn that calls as an empty one
            with pytest.raises(Bad, match="tool calls"):
                ours(talk, options, marked)
            continue
        found = ours(talk, options, marked)
        assert found[0] == expected[0] and np.array_equal(found[1], expected[1]), title
        if name in REWRITTEN or (title == "tools" and name in ("diffusion_gemma", "deepseek_r1_distill", "deepseekv3")):
            continue
        found = ours(talk, options, released)
        assert found[0] == expected[0], title
        trained = found[1].copy()
        if name == "llava_next":  # a space that TRL does not count to the turn it ends
            trained &= np.append(trained[1:], False)
        head = len(marked.tokenizer(HEADS[name])["input_ids"]) if name in HEADS else 0
        for start, end in spans(trained):
            trained[start - head : end] = True
        assert np.array_equal(trained, expected[1]), (title, [marked.tokenizer.decode(found[0][a:b]) for a, b in spans(found[1])])
    assert seen >= 5


def test_all_of_them_are_compared():
    assert len(NAMES) >= 30 and set(HEADS) | set(REWRITTEN) | set(STRUCTURED) < set(NAMES)
