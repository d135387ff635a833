"""What the cases of the generation benchmark share: models, the two sides, figures."""

import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import speed_ratio, take_turns

from relax import LanguageModel, SamplingConfig
from relax.config import to_dataclass
from relax.generation.requests import Request
from relax.model.config import LlamaConfig
from relax.model.llama import make_llama
from relax.model.parameters import parameter_count
from relax.sharding import MeshConfig, make_mesh, parameter_shardings

NEAR_TIE = 1e-4  # of logits: what another order of float32 sums may turn around

Rows = Sequence[Sequence[int]]  # of token ids


class Bench:
    """The models, each made when the first case asks for it, and the sampling."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config

    @cached_property
    def model(self) -> LanguageModel:
        """The model of most cases."""
        return self.make("model")

    @cached_property
    def small_model(self) -> LanguageModel:
        """One whose steps cost little."""
        return self.make("small_model")

    @cached_property
    def gpu_model(self) -> LanguageModel:
        """The model whose decoding is compared with the memory's bandwidth."""
        return self.make("gpu_model")

    @cached_property
    def transformers(self) -> "Transformers":
        """transformers with the weights of `model`."""
        return Transformers(self.model, self._config["threads"])

    def sampling(self, new_tokens: int, **fields: Any) -> SamplingConfig:
        """Returns how to make `new_tokens`, past any end of text."""
        fields = {"max_new_tokens": new_tokens, "ignore_eos": True, **fields}
        return to_dataclass(
            SamplingConfig, {**self._config["sampling"], **fields}, "sampling"
        )

    def make(self, group: str, initializer_range: float | None = None) -> LanguageModel:
        """Returns a group's model, `initializer_range` other than the group's if given.

        Its weights are the seed's.
        """
        fields = dict(self._config[group])
        if initializer_range is not None:
            fields["initializer_range"] = initializer_range
        model = random_model(fields, self._config["seed"])
        print(
            f"{group}: {parameter_count(model.config):,} parameters of scale "
            f"{fields['initializer_range']}, {model.config.compute_dtype}, "
            f"{self._config['threads']} threads, {jax.default_backend()}"
        )
        return model


def random_model(fields: Mapping[str, Any], seed: int) -> LanguageModel:
    """Returns a model with random weights, without tokenizer and stop ids."""
    config = to_dataclass(LlamaConfig, fields, "model")
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    init, tokens = make_llama(config).init, jnp.zeros((1, 2), jnp.int32)
    key = jax.random.key(seed)
    shardings = parameter_shardings(mesh, jax.eval_shape(init, key, tokens))
    params = jax.jit(init, out_shardings=shardings)(key, tokens)
    return LanguageModel(config, params, None, mesh)


def complete(
    model: LanguageModel,
    prompts: Rows,
    sampling: SamplingConfig,
    batch_size: int,
    limits: Sequence[int] | None = None,
    **options: Any,
) -> list[list[int]]:
    """Returns the new tokens of each prompt; `limits`: how many each gets.

    options: of `LanguageModel.complete`. Raises ValueError where a row has another
    number.
    """
    limits = limits or [sampling.max_new_tokens] * len(prompts)
    requests = [
        Request(tuple(prompt), index, 0, limit)
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    done = dict(model.complete(requests, sampling, batch_size, **options))
    rows = [done[index].token_ids for index in range(len(requests))]
    check_lengths("relax", rows, limits)
    return rows


class Transformers:
    """transformers' generate with a model's weights, greedily and past any end."""

    def __init__(self, model: LanguageModel, threads: int):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        torch.set_num_threads(threads)
        disable_progress_bar()
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root, "model")
            model.save_hf(folder)
            self._model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32
            )
            # Mapped files have small pages: memory of its own reads faster.
            for parameter in self._model.parameters():
                parameter.data = parameter.data.clone()
        self._model.generation_config.eos_token_id = None

    def complete(self, prompts: Rows, new_tokens: int) -> list[list[int]]:
        """Returns the new tokens of each prompt; prompts are padded on the left.

        Raises ValueError where a row hasn't `new_tokens`.
        """
        import torch

        width = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        output = self._model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        rows = output[:, width:].tolist()
        check_lengths("transformers", rows, [new_tokens] * len(rows))
        return rows


def check_lengths(side: str, rows: Rows, limits: Sequence[int]) -> None:
    """Raises ValueError where a row isn't as long as its limit."""
    lengths = list(map(len, rows))
    if lengths != list(limits):
        raise ValueError(f"{side} made {lengths} tokens, not {list(limits)}")


def check_same(model: LanguageModel, prompts: Rows, ours: Rows, theirs: Rows) -> None:
    """Prints how far the new tokens of two sides agree.

    Raises ValueError where they part and the two tokens are no near-tie.
    """
    ties = 0
    for row, (prompt, a, b) in enumerate(zip(prompts, ours, theirs, strict=True)):
        at = next((i for i in range(len(a)) if a[i] != b[i]), None)
        if at is None:
            continue
        logits = model.logits(np.asarray([[*prompt, *a[:at]]]))[0, -1]
        gap = abs(float(logits[a[at]] - logits[b[at]]))
        if gap > NEAR_TIE:
            raise ValueError(
                f"row {row} parts at new token {at}: {a[at]} and {b[at]}, whose logits "
                f"differ by {gap:.1e}: the sides do different work"
            )
        ties += 1
    note = f", {ties} up to a near-tie" if ties else ""
    print(f"same tokens: {len(prompts) - ties} of {len(prompts)} rows{note}")


def random_prompts(
    vocab_size: int, lengths: Sequence[int], generator: np.random.Generator
) -> list[list[int]]:
    """Returns prompts of so many random tokens each."""
    return [generator.integers(vocab_size, size=n).tolist() for n in lengths]


def run_turns(
    model: LanguageModel,
    sides: Mapping[Hashable, Callable[[], Rows]],
    case: Mapping[str, Any],
) -> tuple[dict[Hashable, list[float]], dict[Hashable, Rows]]:
    """Returns the seconds of each side round by round, and its last new tokens.

    Says so where a program was compiled in a timed round.
    """
    rows = {}

    def keep(name, run):
        def kept():
            rows[name] = run()

        return kept

    kept = {name: keep(name, run) for name, run in sides.items()}
    take_turns(kept, warmup=case["warmup"], rounds=0)
    programs = model.stats.programs
    seconds = take_turns(kept, warmup=0, rounds=case["rounds"])
    if compiled := model.stats.programs - programs:
        print(f"{compiled} programs compiled while timed")
    return seconds, rows


def show_speeds(seconds: Mapping[str, Sequence[float]], tokens: int) -> None:
    """Prints the median speed and time of each side."""
    for name, times in seconds.items():
        middle = median(times)
        print(f"{name:22}{tokens / middle:9,.1f} tokens/s{middle * 1e3:11,.1f} ms")


def show_ratio(
    title: str, ours: Sequence[float], theirs: Sequence[float], bar: float
) -> None:
    """Prints the speed of `ours` in that of `theirs`, beside the least it should be."""
    ratio = median(b / a for a, b in zip(ours, theirs, strict=True))
    verdict = "met" if ratio >= bar else "missed"
    print(f"{title}: {speed_ratio(ours, theirs)}, bar {bar:.2f}: {verdict}", flush=True)


def describe(prompts: Rows) -> str:
    """Returns how many prompts there are, and of how many tokens."""
    count, lengths = len(prompts), [len(prompt) for prompt in prompts]
    least, most = min(lengths), max(lengths)
    span = f"{least}" if least == most else f"{least} to {most}"
    return f"{count} prompt{'s' * (count > 1)} of {span}"
