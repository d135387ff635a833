import json

import pytest

from relax.tasks.arc_files import ArcTask, choose_tasks, read_tasks, with_solutions

PAIR = {"input": [[1, 2]], "output": [[2], [1]]}
TASK = {"train": [PAIR], "test": [{"input": [[3]]}, {"input": [[4]], "output": [[5]]}]}


@pytest.fixture
def written(tmp_path):
    """A callable: the path of a file with the given content, as JSON if not a text."""

    def write(content, name="abc.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_a_file_holds_one_task_named_after_it(written):
    tasks = read_tasks(written({"name": "x", **TASK}))
    assert tasks == {
        "abc": ArcTask("abc", [PAIR], [[[3]], [[4]]], [None, [[5]]]),
    }


def test_a_file_of_the_competition_holds_many_by_id(written):
    other = {"test": [{"input": [[6]], "output": None}], "train": [PAIR, PAIR]}
    tasks = read_tasks(written({"b": TASK, "a": other}))
    assert list(tasks) == ["a", "b"]
    assert tasks["a"] == ArcTask("a", [PAIR, PAIR], [[[6]]], [None])
    assert tasks["b"].inputs == [[[3]], [[4]]]


def test_a_folder_holds_a_task_per_file(written, tmp_path):
    written(TASK, "b.json")
    written({**TASK, "test": TASK["test"][:1]}, "a.json")
    written("no task", "readme.txt")
    tasks = read_tasks(tmp_path)
    assert list(tasks) == ["a", "b"]
    assert (len(tasks["a"].inputs), len(tasks["b"].inputs)) == (1, 2)


def test_the_training_tasks_are_read_from_folder_and_file_alike(data_dir, written):
    folder = data_dir / "arc_agi" / "training"
    tasks = read_tasks(folder)
    assert len(tasks) == 400
    assert sum(len(task.inputs) for task in tasks.values()) == 416
    assert sum(len(task.demonstrations) for task in tasks.values()) == 1302
    combined = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}
    assert read_tasks(written(combined)) == tasks


def test_solutions_fill_in_what_is_not_known(written):
    tasks = read_tasks(written({"a": TASK, "b": TASK}))
    path = written({"b": [[[7, 7]], [[5]]], "other": [[[1]]]}, "solutions.json")
    solved = with_solutions(tasks, path)
    assert solved["a"].outputs == [None, [[5]]]
    assert solved["b"].outputs == [[[7, 7]], [[5]]]
    assert solved["b"].inputs == tasks["b"].inputs


@pytest.mark.parametrize(
    ("solutions", "message"),
    [
        ({"abc": [[[7]]]}, "abc holds 1 grids, and the task has 2 test inputs"),
        ({"abc": [[[7]], [[6]]]}, r'abc\[1\] is not the "output" that task.path gives'),
        ({"abc": [[[7]], [[10]]]}, r"abc\[1\]\[0\] holds 10; cells are"),
        ({"abc": {}}, "abc is dict, not a list"),
        ({"x": [[[7]]]}, "task.solutions=.* solves none of the 1 tasks"),
        ([], "solutions.json is list, not an object"),
    ],
)
def test_solutions_that_do_not_fit_are_named(written, solutions, message):
    tasks = read_tasks(written(TASK))
    with pytest.raises(ValueError, match=message):
        with_solutions(tasks, written(solutions, "solutions.json"))


def with_train(pair):
    return {**TASK, "train": [PAIR, pair]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "abc.json is no JSON: "),
        ([], "abc.json is list, not an object"),
        ({}, "abc.json holds no task"),
        ({"train": [PAIR]}, 'abc.json has no "test"; a task has'),
        ({"test": [PAIR]}, 'abc.json has no "train"; a task has'),
        ({**TASK, "train": {}}, "abc.json: train is dict, not a list"),
        ({**TASK, "train": []}, "abc.json: train is empty"),
        ({**TASK, "test": []}, "abc.json: test is empty"),
        ({**TASK, "test": [[]]}, r"test\[0\] is list, not an object"),
        ({**TASK, "test": [{}]}, r'test\[0\] has no "input"'),
        ({**TASK, "test": [{**PAIR, "output": []}]}, r"test\[0\].output has 0 rows"),
        (with_train({"input": [[1]]}), r'abc.json: train\[1\] has no "output"'),
        (with_train({"output": [[1]]}), r'abc.json: train\[1\] has no "input"'),
        (with_train({**PAIR, "input": "1"}), r"train\[1\].input is str, not a list"),
        (with_train({**PAIR, "input": [1]}), r"input\[0\] is int, not a list"),
        (with_train({**PAIR, "input": [[]]}), r"input\[0\] has 0 cells"),
        (with_train({**PAIR, "input": [[1]] * 31}), r"train\[1\].input has 31 rows"),
        (with_train({**PAIR, "input": [[1] * 31]}), r"input\[0\] has 31 cells"),
        (
            with_train({**PAIR, "output": [[1, 2], [3]]}),
            r"train\[1\].output\[1\] has 1 cells and .*output\[0\] 2",
        ),
        (with_train({**PAIR, "input": [[10]]}), r"input\[0\] holds 10; cells are"),
        (with_train({**PAIR, "input": [[-1]]}), r"input\[0\] holds -1; cells are"),
        (with_train({**PAIR, "input": [[True]]}), r"input\[0\] holds True; cells"),
        (with_train({**PAIR, "input": [["1"]]}), r"input\[0\] holds '1'; cells are"),
        (with_train({**PAIR, "input": [[1.0]]}), r"input\[0\] holds 1.0; cells are"),
        ({"a": TASK, "b": {"train": [PAIR]}}, 'abc.json: b has no "test"'),
        ({"a": TASK, "b": 7}, "abc.json: b is int, not an object"),
    ],
)
def test_a_malformed_task_is_named_with_file_and_place(written, content, message):
    with pytest.raises(ValueError, match=message):
        read_tasks(written(content))


def test_paths_that_hold_nothing_are_named(tmp_path, written):
    with pytest.raises(FileNotFoundError, match=r"task.path=.* holds no .json file"):
        read_tasks(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"task.path=.*none does not exist"):
        read_tasks(tmp_path / "none")
    tasks = read_tasks(written(TASK))
    with pytest.raises(FileNotFoundError, match=r"task.solutions=.* does not exist"):
        with_solutions(tasks, tmp_path / "none")


def test_tasks_are_chosen_by_id_and_number(written):
    tasks = read_tasks(written(dict.fromkeys(["d", "a", "c", "b"], TASK)))

    def chosen(*ids, limit=None):
        return [task.task_id for task in choose_tasks(tasks, ids, limit)]

    assert chosen() == ["a", "b", "c", "d"]
    assert chosen(limit=3) == ["a", "b", "c"]
    assert chosen("d", "b", "d") == ["b", "d"]
    assert chosen("d", "b", limit=1) == ["b"]
    with pytest.raises(ValueError, match=r"task.ids holds 'e', which is none of the 4"):
        chosen("a", "e")


def test_an_id_that_reads_as_a_number_is_found(written):
    tasks = read_tasks(written({"5117e062": TASK, "68688713": TASK}))
    ids = [str(float("5117e062")), str(68688713)]
    assert [task.task_id for task in choose_tasks(tasks, ids, None)] == list(tasks)
