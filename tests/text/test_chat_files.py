"""What a folder's template keeps of its tokens, and one that can't be read."""

import json

import pytest

from relax.build import _read_template
from relax.text.chat import ChatTemplate, load_template, named_template
from relax.text.folder import load_folder_tokenizer
from relax.text.hf_tokenizer import HfTokenizer

SOURCE = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}"


@pytest.fixture(scope="module")
def without_bos(llama2_library):
    """A tokenizer whose plain texts begin with no token, and its config's keys."""
    config = {"add_bos_token": False, "bos_token": {"content": "<s>"}}
    return HfTokenizer(llama2_library.to_str(), config)


def test_variables_are_kept_in_the_own_form_alone(tmp_path, byte_tokenizer):
    variables = {"bos_token": "<é>", "eos_token": "", "pad_token": "<pad>"}
    chat = ChatTemplate(SOURCE, name="mine", variables=variables)
    chat.save(tmp_path / "own")
    chat.save_hf(tmp_path / "hf")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == [
        "chat_template.jinja"
    ]
    loaded = load_template(tmp_path / "own", byte_tokenizer)
    assert loaded.variables == variables
    assert loaded.render([]) == "<é>||<pad>"
    loaded = load_template(tmp_path / "hf", byte_tokenizer)
    assert loaded.render([]) == "|<|endoftext|>|"


def test_variables_that_are_no_json_are_named(tmp_path, tiny):
    ChatTemplate("a", name="mine").save(tmp_path)
    (tmp_path / "relax_chat_template.json").write_text("{")
    with pytest.raises(ValueError, match=r"relax_chat_template\.json is not JSON"):
        load_template(tmp_path, tiny)


def test_templates_have_the_bos_token_that_plain_texts_lack(without_bos, tmp_path):
    assert without_bos.bos_id is None
    chat = named_template("plain", without_bos)
    assert chat.variables["bos_token"] == "<s>"
    assert chat.encode(without_bos, []) == [1]
    without_bos.save(tmp_path)
    chat.save(tmp_path)
    again = load_folder_tokenizer(tmp_path)
    assert load_template(tmp_path, again).encode(again, []) == [1]
    assert named_template("plain", again).variables["bos_token"] == "<s>"
    added = again.with_special_tokens(["<a>"])
    assert named_template("plain", added).variables["bos_token"] == "<s>"


def test_a_bos_token_that_is_null_is_nothing(llama2_library):
    config = {"add_bos_token": False, "bos_token": None}
    tokenizer = HfTokenizer(llama2_library.to_str(), config)
    assert named_template("plain", tokenizer).variables["bos_token"] == ""


def test_a_bos_token_of_the_config_is_special(llama2_library):
    """Also where the tokenizer.json has it as an ordinary piece."""
    spec = json.loads(llama2_library.to_str()) | {"post_processor": None}
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != "<s>"]
    tokenizer = HfTokenizer(json.dumps(spec), {"bos_token": "<s>"})
    assert (tokenizer.bos_id, tokenizer.special_tokens["<s>"]) == (None, 1)
    chat = ChatTemplate("<s>{{ messages[0].content }}", name="mine")
    ids = chat.encode(tokenizer, [{"role": "user", "content": "<s>"}])
    assert (ids[0], 1 in ids[1:]) == (1, False)
    HfTokenizer(json.dumps(spec), {"bos_token": "<absent>"})


def test_a_single_named_template_needs_no_default(tmp_path, tiny):
    config = {"chat_template": [{"name": "rag", "template": "a"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_template(tmp_path, tiny).render([]) == "a"


def test_loading_goes_on_without_a_broken_template(tmp_path, tiny, caplog):
    assert _read_template(tmp_path, tiny) is None
    assert _read_template(tmp_path, None) is None
    assert caplog.text == ""
    (tmp_path / "chat_template.jinja").write_text("a\n{% if")
    assert _read_template(tmp_path, tiny) is None
    assert "chat_template.jinja, line 2" in caplog.text
    (tmp_path / "chat_template.jinja").write_text("a")
    assert _read_template(tmp_path, tiny).render([]) == "a"
