"""The boundary: every mistake is one ValueError line that names the config path."""

from dataclasses import dataclass

import pytest
from omegaconf import OmegaConf

from relax.config import load_config, override, save_config, to_dataclass, to_values


@dataclass(frozen=True, kw_only=True)
class Garden:
    """A group with a field of every type that groups have."""

    rows: int
    width: float
    name: str
    watered: bool
    depth: int | None
    tools: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "tools", tuple(self.tools))
        if self.rows > 11:
            raise ValueError(f"garden.rows={self.rows} must be at most 11")


GARDEN = {
    "rows": 3,
    "width": 2,
    "name": "kitchen",
    "watered": True,
    "depth": None,
    "tools": ["spade", "rake"],
}


def refusal(**changes) -> str:
    """Returns the message with which the boundary refuses a changed group."""
    with pytest.raises(ValueError) as raised:
        to_dataclass(Garden, GARDEN | changes, "garden")
    assert type(raised.value) is ValueError
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_group_becomes_its_frozen_hashable_dataclass():
    garden = to_dataclass(Garden, GARDEN, "garden")
    assert garden == Garden(
        rows=3,
        width=2.0,
        name="kitchen",
        watered=True,
        depth=None,
        tools=("spade", "rake"),
    )
    assert isinstance(garden.width, float)
    assert hash(garden) == hash(to_dataclass(Garden, GARDEN, "garden"))


def test_a_composed_group_reads_the_values_it_refers_to():
    config = OmegaConf.create(
        {"seed": 5, "garden": GARDEN | {"rows": "${seed}", "name": "bed ${.rows}"}}
    )
    garden = to_dataclass(Garden, config.garden, "garden")
    assert (garden.rows, garden.name) == (5, "bed 5")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("row", "did you mean rows?"),
        ("wtaered", "did you mean watered?"),
        ("quux", "known: rows, width, name, watered, depth, tools"),
    ],
)
def test_an_unknown_key_is_named_with_what_was_meant(key, hint):
    assert refusal(**{key: 1}) == f"garden.{key} is no key of the config; {hint}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", "three"),
        ("rows", 3.0),
        ("rows", 3.7),
        ("rows", True),
        ("rows", None),
        ("width", "wide"),
        ("name", ["kitchen"]),
        ("watered", "often"),
        ("depth", "deep"),
        ("tools", "spade"),
    ],
)
def test_a_value_of_another_type_is_refused(field, value):
    assert refusal(**{field: value}).startswith(f"garden.{field}: ")


def test_a_number_written_as_text_is_taken():
    garden = to_dataclass(Garden, GARDEN | {"width": "1e-5", "rows": "7"}, "garden")
    assert (garden.width, garden.rows) == (1e-5, 7)


def test_a_missing_key_is_named():
    rest = {key: value for key, value in GARDEN.items() if key != "depth"}
    with pytest.raises(ValueError, match=r"^garden\.depth is missing"):
        to_dataclass(Garden, rest, "garden")


def test_a_value_left_open_is_named():
    assert refusal(name="???") == "garden.name has no value; give garden.name=..."


def test_a_value_left_open_is_named_in_a_composed_config():
    config = OmegaConf.create({"garden": GARDEN | {"name": "???"}})
    with pytest.raises(
        ValueError, match=r"^garden\.name has no value; give garden\.name=\.\.\.$"
    ):
        to_dataclass(Garden, config.garden, "garden")


def test_a_reference_to_nothing_is_named():
    assert refusal(rows="${nowhere}").startswith("garden.rows: ")
    assert "nowhere" in refusal(rows="${nowhere}")


def test_a_group_s_own_checks_pass_through():
    assert refusal(rows=13) == "garden.rows=13 must be at most 11"


def test_a_key_that_starts_like_its_group_gets_the_whole_path():
    @dataclass(frozen=True, kw_only=True)
    class Bed:
        bedrock: int

    with pytest.raises(ValueError, match=r"^bed\.bedrock: "):
        to_dataclass(Bed, {"bedrock": "hard"}, "bed")


def test_values_outside_the_groups_are_named_alone():
    with pytest.raises(ValueError, match=r"^row is no key .* did you mean rows\?$"):
        to_dataclass(Garden, GARDEN | {"row": 1}, "")
    with pytest.raises(ValueError, match=r"^rows: "):
        to_dataclass(Garden, GARDEN | {"rows": "three"}, "")


def test_a_saved_config_comes_back_as_the_same_plain_values(tmp_path):
    values = {"name": "Bohnenbeet – süß ❀", "garden": GARDEN, "prompt": "\n", "e": 1e-5}
    save_config(values, tmp_path / "config.yaml")
    loaded = load_config(tmp_path / "config.yaml")
    assert loaded == values
    assert type(loaded["garden"]) is dict


def test_to_values_gives_plain_values_with_references_resolved():
    config = OmegaConf.create({"seed": 5, "garden": {"rows": "${seed}"}})
    assert to_values(config) == {"seed": 5, "garden": {"rows": 5}}
    assert type(to_values(config)["garden"]) is dict


SAVED = {"seed": 0, "resume": None, "garden": GARDEN}


def test_override_replaces_single_values_by_their_path():
    changes = {"seed": 7, "garden.width": 1.5, "garden.depth": 2, "resume": "latest"}
    assert override(SAVED, changes) == {
        "seed": 7,
        "resume": "latest",
        "garden": GARDEN | {"width": 1.5, "depth": 2},
    }
    assert SAVED["garden"]["width"] == 2


@pytest.mark.parametrize("value", [[], ["hoe"], ["hoe", "fork", "sieve"]])
def test_override_replaces_a_list_whole(value):
    assert override(SAVED, {"garden.tools": value})["garden"]["tools"] == value


def test_override_without_changes_keeps_everything():
    assert override(SAVED, {}) == SAVED


@pytest.mark.parametrize(
    "path", ["garden", "field", "garden.row", "+garden.row", "~seed", "garden.tools.0"]
)
def test_override_refuses_groups_and_unknown_keys(path):
    with pytest.raises(ValueError) as raised:
        override(SAVED, {path: "orchard"})
    assert str(raised.value).startswith(f"{path}=orchard: ")
    assert "\n" not in str(raised.value)
