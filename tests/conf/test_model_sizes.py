"""conf/model: every file composes to a model of the size and numbers it states."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from relax.config import to_dataclass
from relax.model.config import LlamaConfig
from relax.model.parameters import parameter_count

CONF = Path(__file__).parents[2] / "conf"
FILES = {path.stem: path for path in sorted((CONF / "model").glob("*.yaml"))}
SHARED = [name for name in FILES if name.startswith("_")]
MODELS = [name for name in FILES if not name.startswith("_")]
STATED = re.compile(
    r"^# parameters: (?P<total>[\d,]+)( \(vocabulary of (?P<vocabulary>[\d,]+)\))?$",
    re.MULTILINE,
)

# The totals that the released checkpoints' safetensors files report.
RELEASED = {
    "smollm_135m": 134_515_008,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "mistral_7b_v0_1": 7_241_732_096,
    "mistral_7b_v0_3": 7_248_023_552,
    "mistral_nemo_12b": 12_247_782_400,
}
OWN = {"nano", "tiny", "small", "baby", "gpt2"}

# What a parameter count cannot see, from the released config.json files: theta, kind of
# stretch, its factor, context before it, context, epsilon, window, head width.
SETTINGS = {
    "smollm_135m": (1e4, "default", 1.0, None, 2048, 1e-5, None, 64),
    "llama2_70b": (1e4, "default", 1.0, None, 4096, 1e-5, None, 128),
    "llama3_8b": (5e5, "default", 1.0, None, 8192, 1e-5, None, 128),
    "llama3_1_8b": (5e5, "llama3", 8.0, 8192, 131072, 1e-5, None, 128),
    "llama3_1_405b": (5e5, "llama3", 8.0, 8192, 131072, 1e-5, None, 128),
    "llama3_2_1b": (5e5, "llama3", 32.0, 8192, 131072, 1e-5, None, 64),
    "llama3_2_3b": (5e5, "llama3", 32.0, 8192, 131072, 1e-5, None, 128),
    "qwen2_5_0_5b": (1e6, "default", 1.0, None, 32768, 1e-6, None, 64),
    "qwen2_5_7b": (1e6, "default", 1.0, None, 131072, 1e-6, None, 128),
    "qwen2_5_14b": (1e6, "default", 1.0, None, 131072, 1e-5, None, 128),
    "qwen3_0_6b": (1e6, "default", 1.0, None, 40960, 1e-6, None, 128),
    "mistral_7b_v0_1": (1e4, "default", 1.0, None, 32768, 1e-5, 4096, 128),
    "mistral_7b_v0_3": (1e6, "default", 1.0, None, 32768, 1e-5, None, 128),
    "mistral_nemo_12b": (1e6, "default", 1.0, None, 128000, 1e-5, None, 128),
}


@cache
def model_config(name: str) -> LlamaConfig:
    """Returns `model=name`, with the vocabulary its file counts where it has none."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(overrides=[f"+model={name}"])
    config = to_dataclass(LlamaConfig, composed.model, "model")
    if config.vocab_size is not None:
        return config
    return replace(config, vocab_size=number(stated(name)["vocabulary"]))


def stated(name: str) -> re.Match:
    """Returns the match of the file's `# parameters:` line."""
    match = STATED.search(FILES[name].read_text())
    assert match, f"{FILES[name].name} has no line '# parameters: ...'"
    return match


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_parameters_its_file_states(name):
    assert parameter_count(model_config(name)) == number(stated(name)["total"])


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_size_states_the_parameters_of_its_checkpoint(name):
    assert number(stated(name)["total"]) == RELEASED[name]


def test_every_model_is_a_released_size_or_one_of_ours():
    assert set(MODELS) == set(RELEASED) | OWN


@pytest.mark.parametrize("name", SETTINGS)
def test_a_released_size_has_the_settings_of_its_checkpoint(name):
    config = model_config(name)
    assert SETTINGS[name] == (
        config.rope_theta,
        config.rope_type,
        config.rope_factor,
        config.rope_original_max_position_embeddings,
        config.max_position_embeddings,
        config.rms_norm_eps,
        config.sliding_window,
        config.head_width,
    )


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_file_is_no_model_by_itself(name):
    with pytest.raises(ValueError, match=r"^model\.\w+"):
        model_config(name)
