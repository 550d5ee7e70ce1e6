"""Named templates write the turns that their models were trained on; the order in which a template is chosen."""
# ruff: noqa: RUF001

import dataclasses
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from aligner.data.catalogue import NAMED, find, template, with_template
from aligner.data.samples import Bad
from aligner.data.templates import DEFAULT_TEMPLATE, chat_template, render
from aligner.types import UserError
from tests.data import tiny
from tests.data.test_turns import assistant, encode, runs, user

SYSTEM = {"role": "system", "content": "S"}
TALK = [user("q"), assistant("a"), user("r"), assistant("b")]

EXPECTED = {
    "alpaca": "S\n\n### Instruction:\nq\n\n### Response:\na</s>\n\n### Instruction:\nr\n\n### Response:\nb</s>\n\n",
    "baichuan2": "S\n<reserved_106>q<reserved_107>a</s><reserved_106>r<reserved_107>b</s>",
    "chatglm2": "[gMASK]sopS\n[Round 1]\n\n问：q\n\n答：a</s>[Round 2]\n\n问：r\n\n答：b</s>",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
              "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    "deepseek": "<s>S\n\nUser: q\n\nAssistant: a</s>User: r\n\nAssistant: b</s>",
    "deepseek_v3": "<s>S<｜User｜>q<｜Assistant｜>a</s><｜User｜>r<｜Assistant｜>b</s>",
    "gemma": "<s><start_of_turn>user\nS\n\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
             "<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n",
    "glm4": "[gMASK]<sop><|system|>\nS<|user|>\nq<|assistant|>\na<|user|>\nr<|assistant|>\nb",
    "intern2": "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
               "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    "llama2_hf": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nq [/INST] a </s><s>[INST] r [/INST] b </s>",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>",
    "mistral": "<s>[INST] S\n\nq [/INST] a</s>[INST] r [/INST] b</s>",
    "phi": "<|system|>\nS<|end|>\n<|user|>\nq<|end|>\n<|assistant|>\na<|end|>\n<|user|>\nr<|end|>\n<|assistant|>\nb<|end|>\n",
    "vicuna": "S USER: q ASSISTANT: a</s>USER: r ASSISTANT: b</s>",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nq</s>\n<|assistant|>\na</s>\n<|user|>\nr</s>\n<|assistant|>\nb</s>\n",
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_text_of_a_conversation(name):
    assert render([SYSTEM, *TALK], tiny.text_model(template(name)).assets) == EXPECTED[name]


def test_all_of_them_grow_turn_by_turn_and_train_the_answers_with_their_end():
    model = tiny.text_model()
    for name, roles in NAMED.items():
        model.assets.tokenizer.chat_template = template(name)
        whole = render(TALK, model.assets)
        assert whole.startswith(render(TALK[:3], model.assets, add_generation_prompt=True)), name
        trained = runs(encode(TALK, model), model)
        end = roles.end.replace("{eos}", "</s>").strip()
        assert len(trained) == 2 and all(end in text for text in trained), (name, trained)
        assert [text.strip().removesuffix(end).strip() for text in trained] == ["a", "b"], (name, trained)
    with pytest.raises(Bad, match="alpaca has no turn of the role tool"):
        render([*TALK, {"role": "tool", "content": "x"}], tiny.text_model(template("alpaca")).assets)


@dataclasses.dataclass(frozen=True)
class FakeAssets:
    tokenizer: object
    processor: object = None
    chat_template: str | None = None


@dataclasses.dataclass(frozen=True)
class FakeModel:
    assets: FakeAssets


def test_the_order_of_templates(tmp_path):
    def chosen(own, **data):
        return with_template(FakeModel(FakeAssets(tiny.tokenizer(own))), ConfigDict(data)).assets.chat_template

    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    for value, text in [("vicuna", template("vicuna")), (str(tmp_path / "mine.jinja"), "{{ messages }}"), ("{{ 1 }}", "{{ 1 }}")]:
        assert chosen(tiny.CHATML, chat_template=value, default_template="zephyr") == text, "the user's"
    assert chosen(tiny.CHATML, chat_template="", default_template="zephyr") is None, "the checkpoint's"
    assert chosen(None, chat_template="", default_template="zephyr") == template("zephyr"), "a named one"
    assert chosen(None, chat_template="", default_template="") is None
    assert chat_template(SimpleNamespace(tokenizer=tiny.tokenizer(None), processor=None)) == DEFAULT_TEMPLATE, "the plain one"
    with pytest.raises(UserError, match=r"config.data.chat_template is 'zephir', .* did you mean 'zephyr'"):
        find("zephir", "data.chat_template")


@pytest.mark.parametrize(("written", "name"), [("llama-3", "llama3"), ("GLM-4", "glm4"), ("DeepSeek-V3", "deepseek_v3"), ("internlm2", "intern2")])
def test_names_as_people_write_them(written, name):
    assert render([SYSTEM, *TALK], tiny.text_model(find(written, "data.chat_template")).assets) == EXPECTED[name]


def test_a_broken_template_is_named():
    with pytest.raises(UserError, match="the chat template is no Jinja, line 1: "):
        render(TALK, tiny.text_model("{% if %}").assets)


def test_a_template_travels_with_the_checkpoint(tmp_path):
    from aligner.convert.assets import Assets

    source, target = tmp_path / "source", tmp_path / "target"
    tiny.tokenizer().save_pretrained(source)
    target.mkdir()
    assets = Assets(source, chat_template=template("zephyr"))
    assert assets.tokenizer.chat_template == template("zephyr")
    assets.copy_to(target)
    assert Assets(target).tokenizer.chat_template == template("zephyr")
