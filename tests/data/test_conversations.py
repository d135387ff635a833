"""Files of conversations: those that are published, and mistakes in one's own."""

import json
from collections import Counter
from pathlib import Path

import platformdirs
import pytest
import yaml

from relax.data.conversations import ConversationsConfig, load_conversations

CONF = Path(__file__).parents[2] / "conf/data"


def config_of(path, **changes):
    values = {}
    for name in ("_records", "conversations"):
        values |= yaml.safe_load((CONF / f"{name}.yaml").read_text())
    del values["defaults"]
    return ConversationsConfig(**(values | {"path": str(path)} | changes))


@pytest.mark.parametrize(
    ("name", "messages"),
    [("fastchat_dummy_conversation.json", 2000), ("v1_sft_demo.jsonl", 1000)],
)
def test_published_files_load_whole(data_dir, name, messages):
    path = data_dir / "sft" / name
    records = load_conversations(config_of(path))
    assert (len(records.train), len(records.validation)) == (450, 50)
    assert records.source == str(path)
    all_messages = [
        m for r in [*records.train, *records.validation] for m in r["messages"]
    ]
    roles = Counter(message["role"] for message in all_messages)
    assert roles == {"user": messages / 2, "assistant": messages / 2}
    assert all(message["content"].strip() for message in all_messages)


def test_a_published_file_s_weights_and_parts_are_kept(data_dir):
    path = data_dir / "sft" / "v1_sft_demo.jsonl"
    first = load_conversations(config_of(path)).train[0]
    name, author = "{{name}}", "{{author}}"
    assert first["messages"] == [
        {"role": "user", "content": "hi", "weight": 0.0},
        {
            "role": "assistant",
            "content": f"Hello! I am {name}, an AI assistant developed by {author}. "
            "How can I assist you today?",
            "weight": 1.0,
        },
    ]


def test_a_set_template_makes_messages_of_alpaca(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"instruction": "Add.", "output": "3"}))
    plain, chat = (
        load_conversations(config_of(path, template=t, validation_fraction=0.0))
        for t in (None, "plain")
    )
    assert list(plain.train[0]) == ["prompt", "completion"]
    assert [m["content"] for m in chat.train[0]["messages"]] == ["Add.", "3"]


def test_a_record_s_place_in_the_file_is_named(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps([{"text": "a"}, {"txt": "b"}]))
    with pytest.raises(ValueError, match=r"data\.form=auto: record 1: .*txt"):
        load_conversations(config_of(path))


def test_tokens_are_kept_in_the_user_s_cache_folder_or_another(tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    assert config_of("a.json").cache == tmp_path / "relax"
    assert config_of("a.json", cache_dir="~/mine").cache == Path.home() / "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "chatml"}, r"data\.form='chatml' is unknown; choose one of auto"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction=1\.0"),
        ({"loss_on": "user"}, r"data\.loss_on='user' is unknown"),
    ],
)
def test_mistakes_in_the_configuration_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("a.json", **changes)
