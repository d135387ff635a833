"""How far ReLax is from transformers on one checkpoint."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import relax
from relax import LanguageModel, SamplingConfig

TOLERANCE = 1e-4
# A sum of float32 numbers can't come closer than a few units in their last place.
RELATIVE_TOLERANCE = 1e-6
PAD = 0


class Inputs(NamedTuple):
    """What both sides are given: two rows of ids, and how much of them.

    padded: the same ids, the second row moved right behind padding; real: where there
    is none. prompt: of the greedy continuation by `new_tokens` ids.
    """

    tokens: np.ndarray  # [2, T]
    padded: np.ndarray  # [2, T]
    real: np.ndarray  # [2, T]
    prompt: list[int]
    new_tokens: int


class Outputs(NamedTuple):
    """One side's answers. hidden: before each layer, and after the final norm."""

    logits: np.ndarray  # [2, T, V]
    hidden: np.ndarray  # [L + 1, 2, T, D]
    padded_logits: np.ndarray  # of the real tokens
    greedy: list[int]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Absolute differences between the two sides in one dtype, and agreement.

    logits, mean_logits: largest and mean over all tokens. hidden: largest per layer,
    and hidden_sizes the largest value there. padded_logits: largest at the real tokens
    of a left-padded batch. agreed: equal greedy ids before the first that differ, of
    `new_tokens`; gap: how far the peer's own logits hold the two apart there.
    rounding, peer_rounding: each side's mean distance to the peer's logits in float32
    with the same weights (None where the dtype is float32).
    """

    dtype: str
    logits: float
    mean_logits: float
    hidden: tuple[float, ...]
    hidden_sizes: tuple[float, ...]
    padded_logits: float
    agreed: int
    new_tokens: int
    gap: float | None
    rounding: float | None
    peer_rounding: float | None

    @property
    def rounding_ratio(self) -> float | None:
        """Our rounding error in that of the peer; None for float32."""
        return None if self.rounding is None else self.rounding / self.peer_rounding

    def excesses(self) -> list[str]:
        """Returns what is further apart than float32 may be; nothing for others.

        Greedy ids may differ only where the logits of the two are within tolerance.
        """
        if self.dtype != "float32":
            return []
        errors = {"logits": self.logits, "left-padded logits": self.padded_logits}
        limits = dict.fromkeys(errors, TOLERANCE)
        for layer, size in enumerate(self.hidden_sizes):
            errors[f"hidden states {layer}"] = self.hidden[layer]
            limits[f"hidden states {layer}"] = max(TOLERANCE, RELATIVE_TOLERANCE * size)
        if self.gap is not None:
            name = f"the logits of greedy id {self.agreed}, which differs,"
            errors[name], limits[name] = self.gap, 2 * TOLERANCE
        return [
            f"{name} are {error:.1e} apart, more than {limits[name]:.1e}"
            for name, error in errors.items()
            if not error <= limits[name]  # nan is an excess too
        ]


def measure(
    folder: Path, dtype: str, num_tokens: int = 64, new_tokens: int = 64
) -> Parity:
    """Returns how far the two are apart on the checkpoint in `folder`, run in `dtype`.

    Raises ValueError where its context is too short for so many tokens.
    """
    model = relax.load(folder, dtype=dtype)
    inputs = make_inputs(model, num_tokens, new_tokens)
    return compare(model, load_peer(folder, dtype), inputs)


def load_peer(folder: Path, dtype: str) -> torch.nn.Module:
    """Returns transformers' model, its attention written out as ours is defined."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    )


def make_inputs(model: LanguageModel, num_tokens: int, new_tokens: int) -> Inputs:
    """Returns rows of a text where the model has a tokenizer, of random ids elsewhere.

    Raises ValueError where the context is too short.
    """
    prompt_length, context = num_tokens // 4, model.config.max_position_embeddings
    longest = max(num_tokens, prompt_length + new_tokens)
    if prompt_length < 1 or longest > context:
        raise ValueError(
            f"--tokens={num_tokens} with --new-tokens={new_tokens} needs 4 tokens at "
            f"least and a context of {longest}; the model has {context}"
        )
    if model.tokenizer is None:
        shape, generator = (2, num_tokens), np.random.default_rng(0)
        tokens = generator.integers(model.config.vocab_size, size=shape)
    else:
        tokens = np.array(_text_rows(model, num_tokens))
    padding = np.array([[0], [num_tokens * 3 // 8]])
    real = np.arange(num_tokens) >= padding
    padded = np.where(real, tokens, PAD)
    return Inputs(tokens, padded, real, tokens[0, :prompt_length].tolist(), new_tokens)


def _text_rows(model: LanguageModel, num_tokens: int) -> list[list[int]]:
    text = (files("relax.data") / "shakespeare_excerpt.txt").read_text("utf-8")
    half = len(text) // 2
    rows = [model.encode(part)[:num_tokens] for part in (text[:half], text[half:])]
    if min(map(len, rows)) < num_tokens:
        raise ValueError(f"--tokens={num_tokens} is more than {min(map(len, rows))}")
    return rows


def compare(model: LanguageModel, peer: torch.nn.Module, inputs: Inputs) -> Parity:
    """Returns how far two loaded models are apart; `peer` is in float32 afterwards."""
    dtype = str(peer.dtype).removeprefix("torch.")
    ours, theirs = run_relax(model, inputs), run_peer(peer, inputs)
    pairs = zip(ours.greedy, theirs.greedy, strict=True)
    agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), inputs.new_tokens)
    gap = rounding = peer_rounding = None
    if agreed < inputs.new_tokens:
        row = [*inputs.prompt, *theirs.greedy[:agreed]]
        logits = _numpy(peer(torch.tensor([row])).logits)[0, -1]
        gap = float(logits[theirs.greedy[agreed]] - logits[ours.greedy[agreed]])
    if dtype != "float32":
        rounding, peer_rounding = rounding_errors(model, peer, inputs.tokens)
    logits, hidden = (_apart(ours[i], theirs[i]) for i in (0, 1))
    return Parity(
        dtype=dtype,
        logits=float(logits.max()),
        mean_logits=float(logits.mean()),
        hidden=tuple(hidden.max(axis=(1, 2, 3)).tolist()),
        hidden_sizes=tuple(np.abs(theirs.hidden).max(axis=(1, 2, 3)).tolist()),
        padded_logits=float(_apart(ours.padded_logits, theirs.padded_logits).max()),
        agreed=agreed,
        new_tokens=inputs.new_tokens,
        gap=gap,
        rounding=rounding,
        peer_rounding=peer_rounding,
    )


@torch.inference_mode()
def rounding_errors(
    model: LanguageModel, peer: torch.nn.Module, tokens: np.ndarray
) -> tuple[float, float]:
    """Returns each side's mean distance to the peer's logits in float32.

    The weights are the same; `peer` is in float32 afterwards.
    """
    ours = np.asarray(model.logits(tokens))
    theirs = _numpy(peer(torch.tensor(tokens)).logits)
    exact = _numpy(peer.float()(torch.tensor(tokens)).logits)
    return float(_apart(ours, exact).mean()), float(_apart(theirs, exact).mean())


def _apart(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return np.abs(ours - theirs)


def run_relax(model: LanguageModel, inputs: Inputs) -> Outputs:
    """Returns our answers."""
    seen = model.activations(inputs.tokens, ("resid_pre", "final_norm"))
    hidden = [*seen["resid_pre"], seen["final_norm"]]
    sampling = SamplingConfig(
        max_new_tokens=inputs.new_tokens, temperature=0.0, ignore_eos=True
    )
    [completion] = model.generate([inputs.prompt], sampling)
    padded = model.logits(inputs.padded, attention_mask=inputs.real)
    return Outputs(
        np.asarray(model.logits(inputs.tokens)),
        np.stack([np.asarray(state, np.float32) for state in hidden]),
        np.asarray(padded)[inputs.real],
        completion.token_ids,
    )


@torch.inference_mode()
def run_peer(peer: torch.nn.Module, inputs: Inputs) -> Outputs:
    """Returns the answers of transformers."""
    plain = peer(torch.tensor(inputs.tokens), output_hidden_states=True)
    real = torch.tensor(inputs.real)
    # Its generate() counts positions so; a plain call would count the padding too.
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    padded = peer(
        torch.tensor(inputs.padded), attention_mask=real.long(), position_ids=positions
    )
    # Its own may sample, or stop at the end of a text.
    peer.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=inputs.new_tokens, pad_token_id=PAD
    )
    prompt = torch.tensor([inputs.prompt])
    greedy = peer.generate(prompt, attention_mask=torch.ones_like(prompt))
    return Outputs(
        _numpy(plain.logits),
        np.stack([_numpy(state) for state in plain.hidden_states]),
        _numpy(padded.logits)[inputs.real],
        greedy[0, len(inputs.prompt) :].tolist(),
    )


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()
