"""Files of records, as editors and other programs write them."""

import codecs

import pytest

from relax.data.records import read_json_records

RECORDS = [{"text": "é"}, {"text": "b"}]
FILES = {
    "records.json": '[{"text": "é"},\n {"text": "b"}]',
    "records.jsonl": '{"text": "é"}\r\n\n{"text": "b"}\n',
}


@pytest.mark.parametrize("start", [b"", codecs.BOM_UTF8], ids=["plain", "bom"])
@pytest.mark.parametrize("name", FILES)
def test_records_are_read(tmp_path, name, start):
    path = tmp_path / name
    path.write_bytes(start + FILES[name].encode())
    assert read_json_records(str(path)) == RECORDS


@pytest.mark.parametrize("text", [FILES["records.jsonl"], "\n{}\n[]", "[1]\n[2]"])
def test_json_lines_by_another_name_are_told(tmp_path, text):
    path = tmp_path / "records.json"
    path.write_text(text, encoding="utf-8")
    message = r"data\.path=.*looks like JSON lines: name the file \.jsonl"
    with pytest.raises(ValueError, match=message):
        read_json_records(str(path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"text": "a"},\n{', "Expecting property name"),
        ("a.json", "", "Expecting value: line 1"),
        ("a.json", '{\n"text": "a"}\n{\n}', r"Extra data: line 3 column 1 [^;]*$"),
        ("a.json", '{"text": "a"}', "is no JSON array"),
        ("a.jsonl", "{}\n{", "line 2 is not JSON"),
    ],
)
def test_other_mistakes_are_left_at_that(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_json_records(str(path))
    assert "JSON lines" not in str(caught.value)
