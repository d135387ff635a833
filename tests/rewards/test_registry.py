"""Rewards by name, and functions of a user's by module and name."""

import sys

import pytest

from relax.rewards import REWARDS, find_reward

MODULE = """
def seven(sample):
    return 7.0

number = 7
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a module of a user's, and one that can't be imported."""
    (tmp_path / "my_rewards_53.py").write_text(MODULE)
    (tmp_path / "broken_rewards_59.py").write_text("1 / 0")
    (tmp_path / "leaving_rewards_61.py").write_text("import sys; sys.exit(2)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_rewards_53", None)


def test_by_name():
    assert {name: find_reward(name) for name in REWARDS} == REWARDS
    assert set(REWARDS) == {
        *("exact_match", "numeric_answer", "last_number", "arithmetic", "countdown"),
        *("format", "ends", "length", "overlong"),
    }


def test_by_module_and_function(folder):
    assert find_reward("my_rewards_53:seven")(None) == 7.0
    assert find_reward("math:isfinite")(1.0) is True


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "exactmatch",
            r"trainer\.rewards=exactmatch is unknown; choose .*exact_match",
        ),
        ("", r"trainer\.rewards= is unknown"),
        ("my_rewards_53:eight", r"my_rewards_53 has no function 'eight'"),
        ("my_rewards_53:number", r"my_rewards_53 has no function 'number'"),
        ("my_rewards_53:", r"my_rewards_53 has no function ''"),
        ("my_rewards_54:f", r"'my_rewards_54' can't be imported: ModuleNotFoundError"),
        ("broken_rewards_59:f", r"can't be imported: ZeroDivisionError: division"),
        ("leaving_rewards_61:f", r"can't be imported: SystemExit: 2"),
        (":f", r"trainer\.rewards=:f: '' can't be imported: ValueError: Empty"),
        (".x:f", r"trainer\.rewards=\.x:f: '\.x' can't be imported: TypeError"),
    ],
)
def test_mistakes_are_named(folder, name, message):
    with pytest.raises(ValueError, match=message):
        find_reward(name)
