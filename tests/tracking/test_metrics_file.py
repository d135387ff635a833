"""JSON-lines files: what is written is read back, and a resume cuts the tail."""

import json

import pytest

from relax.tracking.metrics_file import MetricsFile, cut_back, read_metrics


def write_rows(path, steps):
    file = MetricsFile(path, resume_step=None)
    for step in steps:
        file.write({"step": step, "kind": "train", "loss": step / 8})
    file.close()


def steps_in(path):
    return [row["step"] for row in read_metrics(path)]


def test_a_row_is_one_line_on_disk_before_the_file_is_closed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resume_step=None)
    file.write({"step": 3, "kind": "eval", "val_loss": 1.25})
    assert path.read_text() == '{"step": 3, "kind": "eval", "val_loss": 1.25}\n'
    file.close()


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resume_step=None)
    file.write({"step": 1, "loss": float("nan"), "a": float("inf"), "b": -float("inf")})
    file.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "a": None, "b": None}


def test_a_row_holds_whatever_json_can_say(tmp_path):
    path = tmp_path / "rows.jsonl"
    file = MetricsFile(path, resume_step=None)
    row = {"step": 1, "none": None, "done": True, "text": "é", "ids": [2, 3], "few": ()}
    file.write({**row, "nested": {"rates": [0.5, float("nan")]}})
    file.close()
    nested = {"rates": [0.5, None]}
    assert read_metrics(path) == [{**row, "few": [], "nested": nested}]


def test_half_a_character_is_written_as_the_escape_that_json_has(tmp_path):
    path = tmp_path / "rows.jsonl"
    file = MetricsFile(path, resume_step=None)
    rows = [{"step": 1, "text": "\\\ud83d é"}, {"step": 2, "\udc00": ["\ud83d"]}]
    for row in rows:
        file.write(row)
    file.close()
    assert path.read_bytes().splitlines()[0] == (
        b'{"step": 1, "text": "\\\\\\ud83d \xc3\xa9"}'
    )
    assert read_metrics(path) == rows
    MetricsFile(path, resume_step=1).close()
    assert read_metrics(path) == rows[:1]


def test_a_resumed_file_goes_on_after_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [2, 3, 5, 7, 11])
    file = MetricsFile(path, resume_step=5)
    file.write({"step": 6, "kind": "train", "loss": 0.5})
    file.close()
    assert steps_in(path) == [2, 3, 5, 6]


def test_a_fresh_file_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [2, 3])
    write_rows(path, [5])
    assert steps_in(path) == [5]


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', '{"text": "é'.encode()[:-1]])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [2, 3])
    with path.open("ab") as file:
        file.write(torn)
    assert steps_in(path) == [2, 3]
    cut_back(path, 7)
    assert path.read_bytes().endswith(b'"loss": 0.375}\n')
    assert steps_in(path) == [2, 3]


def test_a_whole_last_row_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 3}')
    cut_back(path, 3)
    assert path.read_text() == '{"step": 2}\n{"step": 3}\n'


def test_kept_lines_keep_their_bytes(tmp_path):
    path = tmp_path / "samples.jsonl"
    lines = ['{"step":2,  "completion": "né\\u2028\\n"}\n', '{"step": 7}\n']
    path.write_text("".join(lines), encoding="utf-8")
    cut_back(path, 2)
    assert path.read_text(encoding="utf-8") == lines[0]


def test_a_broken_line_in_the_middle_is_an_error_and_nothing_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\nbroken\n{"step": 5}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        cut_back(path, 2)
    assert path.read_text() == '{"step": 2}\nbroken\n{"step": 5}\n'


def test_resuming_without_a_file_starts_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, resume_step=3).close()
    assert read_metrics(path) == []
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "other.jsonl")
