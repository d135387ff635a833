import pytest

from relax.tasks.conversation import read_messages, write_messages


def test_a_file_is_written_complete_or_not_at_all(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text("of an earlier day")
    with pytest.raises(TypeError):
        write_messages(path, [{"role": "user", "content": object()}])
    with pytest.raises(ValueError, match="can't be written: No such file or directory"):
        write_messages(tmp_path / "no" / "chat.json", [])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder can't be written: Is a directory"):
        write_messages(tmp_path / "folder", [])
    names = sorted(each.name for each in tmp_path.iterdir())
    assert (names, path.read_text()) == (["chat.json", "folder"], "of an earlier day")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "can't be read: No such file or directory"),
        (b"{", "is no JSON: "),
        (b"\xff", "is no JSON: "),
        (b"[]", 'holds no list under "messages"'),
        (b'{"messages": {}}', 'holds no list under "messages"'),
        (b'{"messages": ["hello"]}', "message 0 has no texts under"),
        (b'{"messages": [{"role": "user"}]}', "message 0 has no texts under"),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", '
            b'"content": 7}]}',
            "message 1 has no texts under",
        ),
    ],
)
def test_a_file_without_messages_is_named(tmp_path, data, message):
    path = tmp_path / "chat.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_messages(path)
    assert str(path) in str(error.value)
