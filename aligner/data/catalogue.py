# ruff: noqa: RUF001
"""Chat templates by name, as Jinja text, for checkpoints that bring none, and what decides which template is used.

The order: `config.data.chat_template` (a .jinja file, Jinja text, or a name from here) > the checkpoint's own > `default_template` (a
name from here) > "USER: / ASSISTANT:". All of them mark with {% generation %} what the assistant writes, its end included.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, NamedTuple

from aligner.types import Model, UserError


class Roles(NamedTuple):
    """What stands around each turn. In all strings {bos} and {eos} are the tokenizer's, {round} counts the user's turns from 1."""

    user: tuple[str, str]
    ask: str  # before the assistant's words: the generation prompt
    end: str = "{eos}"  # after them, and trained with them
    system: tuple[str, str] = ("", "\n")
    default: str = ""  # what the system says where a conversation does not
    start: str = ""  # before everything
    merged: bool = False  # the system's words stand inside the first turn of the user
    tool: tuple[str, str] | None = None
    lead: str = ""  # before the assistant's words, trained with them: tokenizers join a space with the word after it
    gap: str = ""  # between the assistant's end and what follows, not trained


def _chatml(default: str = "", start: str = "", gap: str = "\n") -> Roles:
    turn = lambda role: (f"<|im_start|>{role}\n", f"<|im_end|>{gap}")
    return Roles(turn("user"), "<|im_start|>assistant\n", "<|im_end|>", turn("system"), default, start, tool=turn("tool"), gap=gap)


HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"


def _llama(header: str = HEADER, end: str = "<|eot_id|>", names: tuple[str, str] = ("user", "assistant")) -> Roles:
    turn = lambda role: (header.format(role), end)
    return Roles(turn(names[0]), header.format(names[1]), end, turn("system"), start="{bos}", tool=turn("ipython"))


def _plain(user: str, assistant: str, between: str = "\n\n", **options: Any) -> Roles:
    return Roles((user, between), assistant, **options)


POLITE = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
VICUNA = "A chat between a curious user and an artificial intelligence assistant. " + POLITE.format("user")
CURIOUS = "A chat between a curious human and an artificial intelligence assistant. " + POLITE.format("human")
SYS = ("<<SYS>>\n", "\n<</SYS>>\n\n")
_GLM = dict(end="", system=("<|system|>\n", ""), start="[gMASK]<sop>")
_VICUNA = Roles(("USER: ", " "), "ASSISTANT:", "{eos}", ("", " "), VICUNA, lead=" ")
_ZEPHYR = Roles(("<|user|>\n", "{eos}\n"), "<|assistant|>\n", "{eos}", ("<|system|>\n", "{eos}\n"), gap="\n")

NAMED = {
    "alpaca": _plain("### Instruction:\n", "### Response:\n", gap="\n\n", system=("", "\n\n"),
                     default="Below is an instruction that describes a task. Write a response that appropriately completes the request."),
    "aquila": Roles(("Human: ", "###"), "Assistant:", "###", ("System: ", "###"), CURIOUS),
    "atom": Roles(("{bos}Human: ", "\n{eos}"), "{bos}Assistant:", "\n{eos}"),
    "baichuan": Roles(("<reserved_102>", ""), "<reserved_103>"),
    "baichuan2": Roles(("<reserved_106>", ""), "<reserved_107>"),
    "belle": _plain("Human: ", "Belle: ", start="{bos}", gap="\n\n"),
    "bluelm": Roles(("[|Human|]:", ""), "[|AI|]:"),
    "breeze": Roles(("[INST] ", " [/INST] "), "", start="{bos}", system=("", " ")),
    "chatglm2": Roles(("[Round {round}]\n\n问：", "\n\n"), "答：", start="[gMASK]sop"),
    "chatglm3": Roles(("<|user|>\n", ""), "<|assistant|>\n", **(_GLM | dict(start="[gMASK]sop")), tool=("<|observation|>\n", "")),
    "chatml": _chatml(),
    "chatml_de": _chatml("Du bist ein freundlicher und hilfsbereiter KI-Assistent."),
    "codegeex2": Roles(("", ""), "", start="[gMASK]sop"),
    "codegeex4": Roles(("<|user|>\n", ""), "<|assistant|>\n", **_GLM, tool=("<|observation|>\n", "")),
    "cohere": Roles(("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"), "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
                    "<|END_OF_TURN_TOKEN|>", ("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"), start="{bos}"),
    "cpm": Roles(("<用户>", ""), "<AI>", start="{bos}"),
    "dbrx": _chatml(),
    "deepseek": _plain("User: ", "Assistant:", start="{bos}", system=("", "\n\n"), lead=" "),
    "deepseekcoder": Roles(("### Instruction:\n", "\n"), "### Response:\n", "\n<|EOT|>", start="{bos}", gap="\n"),
    "deepseek_v3": Roles(("<｜User｜>", ""), "<｜Assistant｜>", system=("", ""), start="{bos}"),
    "dolphin": _chatml("You are Dolphin, a helpful AI assistant."),
    "falcon": Roles(("User: ", "\n"), "Falcon:", lead=" ", gap="\n"),
    "gemma": Roles(("<start_of_turn>user\n", "<end_of_turn>\n"), "<start_of_turn>model\n", "<end_of_turn>", ("", "\n\n"), start="{bos}",
                   merged=True, gap="\n"),
    "glm4": Roles(("<|user|>\n", ""), "<|assistant|>\n", **_GLM, tool=("<|observation|>\n", "")),
    "intern": Roles(("<|User|>:", "\n"), "<|Bot|>:", "<eoa>", ("<|System|>:", "\n"), start="{bos}", gap="\n"),
    "intern2": _chatml(start="{bos}"),
    "internlm2": _chatml(start="{bos}"),
    "llama2": Roles(("{bos}[INST] ", " [/INST]"), "", " {eos}", SYS, merged=True),
    "llama2_hf": Roles(("{bos}[INST] ", " [/INST]"), "", " {eos}", SYS, merged=True, lead=" "),
    "llama2_zh": Roles(("{bos}[INST] ", " [/INST]"), "", " {eos}", SYS, "You are a helpful assistant. 你是一个乐于助人的助手。",
                       merged=True),
    "llama3": _llama(),
    "llama4": _llama("<|header_start|>{}<|header_end|>\n\n", "<|eot|>"),
    "llava": _VICUNA,
    "mistral": Roles(("[INST] ", " [/INST]"), "", "{eos}", ("", "\n\n"), start="{bos}", merged=True, lead=" "),
    "olmo": Roles(("<|user|>\n", "\n"), "<|assistant|>\n", start="{eos}", gap="\n"),
    "openchat": Roles(("GPT4 Correct User: ", "<|end_of_turn|>"), "GPT4 Correct Assistant:", "<|end_of_turn|>", ("", "<|end_of_turn|>"),
                      start="{bos}"),
    "openchat3": _llama(names=("GPT4 Correct User", "GPT4 Correct Assistant")),
    "orion": _plain("Human: ", "Assistant: {eos}", start="{bos}"),
    "phi": Roles(("<|user|>\n", "<|end|>\n"), "<|assistant|>\n", "<|end|>", ("<|system|>\n", "<|end|>\n"), gap="\n"),
    "qwen": _chatml("You are a helpful assistant."),
    "solar": _plain("### User:\n", "### Assistant:\n", system=("### System:\n", "\n\n"), gap="\n\n"),
    "starchat": Roles(("<|user|>\n", "<|end|>\n"), "<|assistant|>\n", "<|end|>", ("<|system|>\n", "<|end|>\n"), gap="\n"),
    "telechat": Roles(("<_user>", ""), "<_bot>", "<_end>", ("<_system>", "<_end>")),
    "vicuna": _VICUNA,
    "xuanyuan": Roles(("Human: ", " "), "Assistant:", lead=" "),
    "xverse": _plain("Human: ", "Assistant: "),
    "yayi": Roles(("<|Human|>:\n", "\n\n"), "<|YaYi|>:", "<|End|>", ("<|System|>:\n", "\n\n"), gap="\n\n"),
    "yi": _chatml(),
    "yi_vl": Roles(("### Human: ", "\n"), "### Assistant:", "\n###", ("", "\n\n"), lead=" "),
    "yuan": Roles(("", ""), "<sep>", "<eod>", gap="\n"),
    "zephyr": _ZEPHYR,
    "ziya": Roles(("<human>:", "\n"), "<bot>:", gap="\n"),
}  # fmt: skip


def template(name: str) -> str:
    """The Jinja text of a named template."""
    roles = NAMED[name]
    system, user = (f"{_jinja(before)} + {{}} + {_jinja(after)}" for before, after in (roles.system, roles.user))
    content = "message['content']"
    if roles.merged:
        content = f"({system.format('system')} if system and loop.first else '') + {content}"
    tool = ""
    if roles.tool:
        tool = "{% elif message['role'] == 'tool' %}{{ " + f"{_jinja(roles.tool[0])} + message['content'] + {_jinja(roles.tool[1])}" + " }}"
    return "".join(
        (
            "{% if messages and messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}",
            f"{{% else %}}{{% set system = {_quoted(roles.default)} %}}{{% set turns = messages %}}{{% endif %}}",
            f"{{{{ {_jinja(roles.start)} }}}}",
            "" if roles.merged else f"{{% if system %}}{{{{ {system.format('system')} }}}}{{% endif %}}",
            "{% for message in turns %}{% if message['role'] == 'user' %}",
            f"{{{{ {user.format(content)} }}}}",
            "{% elif message['role'] == 'assistant' %}",
            f"{{{{ {_jinja(roles.ask)} }}}}{{% generation %}}",
            f"{{{{ {_quoted(roles.lead)} + message['content'] + {_jinja(roles.end)} }}}}{{% endgeneration %}}",
            f"{{{{ {_jinja(roles.gap)} }}}}" if roles.gap else "",
            tool,
            f"{{% else %}}{{{{ raise_exception('the template {name} has no turn of the role ' + message['role']) }}}}{{% endif %}}",
            "{% endfor %}",
            f"{{% if add_generation_prompt %}}{{{{ {_jinja(roles.ask)} }}}}{{% endif %}}",
        )
    )


def _jinja(text: str) -> str:
    """A text with {bos}, {eos} and {round} as a Jinja expression."""
    names = {"{bos}": "(bos_token or '')", "{eos}": "eos_token", "{round}": "((loop.index0 // 2 + 1) | string)"}
    parts, rest = [], text
    while rest:
        name = min((name for name in names if name in rest), key=rest.index, default=None)
        before, _, rest = rest.partition(name) if name else (rest, "", "")
        parts += [_quoted(before)] if before else []
        parts += [names[name]] if name else []
    return " + ".join(parts) or "''"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def find(value: str, key: str) -> str:
    """The Jinja text that a config key stands for: a name from here, a file, or the text itself.

    Raises:
        UserError: neither.
    """
    bare = lambda name: re.sub("[-_.]", "", name.lower())
    if named := next((name for name in NAMED if bare(name) == bare(value)), None):
        return template(named)
    if "{%" in value or "{{" in value:
        return value
    try:
        if Path(value).expanduser().is_file():
            return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:  # too long for a name; not to be read; no text
        raise UserError(f"config.{key} is {value[:80]!r}, which cannot be read: {error}") from None
    near = difflib.get_close_matches(value, NAMED, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"config.{key} is {value!r}, which is no file, no Jinja text and no name; {hint}names are {', '.join(NAMED)}.")


def with_template(model: Model, data: Any) -> Model:
    """The model with the chat template that config.data asks for; what it exports and shows has it too.

    Args:
        model: whose assets may bring a template of their own.
        data: config.data, with `chat_template` and `default_template`.
    """
    assets = model.assets
    text = find(data.chat_template, "data.chat_template") if data.get("chat_template", "") else None
    if text is None and data.get("default_template", ""):
        fallback = find(data.default_template, "data.default_template")
        own = assets.tokenizer.chat_template or (assets.processor is not None and assets.processor.chat_template)
        text = None if own else fallback
    return model if text is None else dataclasses.replace(model, assets=dataclasses.replace(assets, chat_template=text))
