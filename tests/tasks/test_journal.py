import resource

import pytest

from relax.tasks.journal import Journal, OtherFingerprint, append_line

SETTINGS = {"model": "tiny", "sizes": (2, 3), "sampling.top_p": 0.9}
RECORDS = {"0": {"text": "é\u2028\ud800\n"}, "2": {"logprobs": [-0.1, -1e-17]}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl.journal"


@pytest.fixture
def begun(path):
    """The bytes of a journal with RECORDS."""
    with Journal(path, SETTINGS) as journal:
        for key, record in RECORDS.items():
            journal.add(key, record)
    return path.read_bytes()


def test_what_was_added_is_found_again(path, begun):
    with Journal(path, SETTINGS) as journal:
        assert journal.finished == RECORDS
        journal.add("1", {})
        assert journal.finished == {**RECORDS, "1": {}}
    with Journal(path, SETTINGS) as journal:
        assert list(journal.finished) == ["0", "2", "1"]


def test_a_record_is_in_the_file_before_the_journal_is_closed(path):
    with Journal(path, SETTINGS) as journal:
        journal.add("0", {"text": "a"})
        assert path.read_bytes().splitlines()[1] == (
            b'{"key": "0", "record": {"text": "a"}}'
        )


def test_a_file_cut_off_anywhere_holds_the_whole_records(path, begun):
    lines = begun.splitlines(keepends=True)
    whole = [sum(map(len, lines[: n + 1])) for n in range(3)]
    for size in range(len(begun)):
        path.write_bytes(begun[:size])
        with Journal(path, SETTINGS) as journal:
            expected = sum(size >= end for end in whole[1:])
            assert list(journal.finished) == list(RECORDS)[:expected]
            for key in list(RECORDS)[expected:]:
                journal.add(key, RECORDS[key])
        assert path.read_bytes() == begun, size


def test_zeros_that_a_power_cut_leaves_are_no_record(path, begun):
    path.write_bytes(begun + b"\0" * 41)
    with Journal(path, SETTINGS) as journal:
        assert journal.finished == RECORDS
    assert path.read_bytes() == begun


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sampling.top_p": 0.8}, r"with sampling.top_p=0.9, and now it is 0.8: "),
        ({"sizes": (3, 2)}, r"with sizes=\[2, 3\], and now it is \[3, 2\]: "),
        ({"new": 1}, r"with new=None, and now it is 1: "),
    ],
)
def test_records_of_other_settings_are_kept_and_refused(path, begun, changed, message):
    with pytest.raises(
        OtherFingerprint, match=f"out.jsonl.journal was begun {message}"
    ):
        Journal(path, {**SETTINGS, **changed})
    assert path.read_bytes() == begun


def test_a_journal_without_records_begins_anew_with_other_settings(path):
    Journal(path, SETTINGS).close()
    with Journal(path, {"model": "small"}) as journal:
        journal.add("0", {})
    with Journal(path, {"model": "small"}) as journal:
        assert journal.finished == {"0": {}}


@pytest.mark.parametrize("data", [b"my notes\n", b"my notes", b'{"journal": 2}\n'])
def test_another_file_is_left_as_it_is(path, data):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"out.jsonl.journal is no journal of ours"):
        Journal(path, SETTINGS)
    assert path.read_bytes() == data


def test_one_process_at_a_time(path, begun):
    with (
        Journal(path, SETTINGS),
        pytest.raises(ValueError, match="in use by another process"),
    ):
        Journal(path, SETTINGS)
    Journal(path, SETTINGS).close()


def test_it_can_be_removed(path, begun):
    Journal(path, SETTINGS).remove()
    assert not path.exists()


@pytest.fixture
def small_files():
    """No file may grow beyond 100 bytes: a full disk that needs no disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_that_does_not_fit_leaves_the_lines_before(tmp_path, small_files):
    path = tmp_path / "out"
    with path.open("a+b", buffering=0) as file:
        append_line(file, b"a" * 59 + b"\n")
        with pytest.raises(OSError, match=f"File too large: '{path}'"):
            append_line(file, b"b" * 59 + b"\n")
        append_line(file, b"c" * 9 + b"\n")
    assert path.read_bytes() == b"a" * 59 + b"\n" + b"c" * 9 + b"\n"


def test_lines_are_appended_wherever_the_file_was_read(tmp_path):
    with (tmp_path / "out").open("a+b", buffering=0) as file:
        append_line(file, b"first\n")
        file.seek(2)
        append_line(file, b"second\n")
    assert (tmp_path / "out").read_bytes() == b"first\nsecond\n"
