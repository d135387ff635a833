"""Small models that generate: random ones, scripted ones, and a trained one."""

from collections.abc import Callable
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import relax
from relax.generation.generator import Generator
from relax.generation.requests import Completion, Request
from relax.language_model import LanguageModel
from relax.model.llama import LlamaOutput, make_llama
from relax.model.parameters import parameter_shapes
from relax.ops.logprobs import compute_logits
from relax.sampling import SamplingConfig
from relax.sharding import MeshConfig, make_mesh
from relax.text.tiktoken_encodings import END_OF_TEXT, EncodingSpec
from relax.text.tokenizers import (
    TiktokenTokenizer,
    Tokenizer,
)

EOS = 66


def pieces_tokenizer(pieces: list[bytes]) -> Tokenizer:
    """Returns a tokenizer of the given pieces and the end of text after them."""
    ranks = {piece: index for index, piece in enumerate(pieces)}
    specials = {END_OF_TEXT: len(pieces)}
    spec = EncodingSpec(pattern=".", ranks=ranks, special_tokens=specials)
    return TiktokenTokenizer(spec)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """66 characters from "0" to "q", an id each, and the end of text: V = 67."""
    return pieces_tokenizer([bytes([48 + index]) for index in range(EOS)])


@pytest.fixture(scope="session")
def config(make_config):
    return make_config()


def random_params(config, seed=3):
    """Returns parameters whose distributions are far from flat."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), leaf.dtype),
        parameter_shapes(config),
    )


@pytest.fixture(scope="session")
def make_params() -> Callable[..., dict]:
    return random_params


@pytest.fixture(scope="session")
def make_model(config, tokenizer) -> Callable[..., LanguageModel]:
    """A callable: the LanguageModel of random parameters."""
    params = random_params(config)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    return lambda: LanguageModel(config, params, tokenizer, mesh)


@pytest.fixture(scope="session")
def model(make_model) -> LanguageModel:
    return make_model()


@pytest.fixture(scope="session")
def generator(model) -> Generator:
    """The model's own, whose compiled functions the tests then share."""
    return model._generator


@pytest.fixture
def model_with_shifted_positions(make_model, monkeypatch) -> LanguageModel:
    """A model broken on purpose: decode steps turn by the position after their own."""

    def broken(config, constrain):
        init, apply = make_llama(config, constrain)

        def shifted(params, tokens, **inputs):
            if inputs.get("cache") is not None and tokens.shape[1] == 1:
                inputs["positions"] = inputs["cache"].lengths[:, None] + 1
            return apply(params, tokens, **inputs)

        return hk.Transformed(init, shifted)

    monkeypatch.setattr("relax.language_model.make_llama", broken)
    return make_model()


class FullForward(NamedTuple):
    """The next token's logits by a full forward pass, without any cache."""

    logits: Callable[[list[int]], np.ndarray]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Returns `count` tokens, each the most likely one after those before it."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(np.argmax(self.logits(ids)[len(ids) - 1])))
        return ids[len(prompt) :]


@pytest.fixture(scope="session")
def full_forward(config, model) -> FullForward:
    """Rows are padded to one width, so that one program serves every length."""
    width = config.max_position_embeddings

    @jax.jit
    def logits(tokens):
        out = make_llama(config).apply(model.params, tokens)
        return compute_logits(out.hidden, out.unembedding, config.vocab_size)

    def of(ids):
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(logits(padded))[0, : len(ids), : config.vocab_size]

    return FullForward(of)


def _scripted_apply(params, tokens, cache, lengths, cache_rows=None):
    """A model's `apply` that gives the token at place p of `params` at place p."""
    rows = jnp.arange(len(tokens)) if cache_rows is None else cache_rows
    before = cache.lengths.at[rows].get(mode="clip")
    slots = before[:, None] + jnp.arange(tokens.shape[1])
    hidden = 30.0 * jax.nn.one_hot(params[slots + 1], 128)
    after = cache.lengths.at[rows].add(lengths, mode="drop")
    return LlamaOutput(hidden, jnp.eye(128), cache._replace(lengths=after))


@pytest.fixture(scope="session")
def scripted_apply():
    """A model of 128 padded ids that says what its parameters, a row of ids, say."""
    return _scripted_apply


class Scripted(NamedTuple):
    """A generator whose model continues every prompt by a script of ids.

    A prompt is the first tokens of the script.
    """

    generator: Generator
    script: list[int]

    def complete(self, sampling: SamplingConfig, *lengths: int) -> list[Completion]:
        """Returns completions of prompts of the given lengths."""
        return self.generator.run(self.params, self._requests(lengths), sampling)

    def stream(self, sampling: SamplingConfig, length: int) -> list[str]:
        """Returns a completion's text after each dispatch."""
        completion, seen = Completion(), []
        for _ in self.generator.run_in_chunks(
            self.params, self._requests([length]), sampling, [completion]
        ):
            seen.append(completion.text)
        return seen

    @property
    def params(self):
        return jnp.asarray([*self.script, *[0] * 128])

    def _requests(self, lengths):
        return [Request(tuple(self.script[:n]), i, 0) for i, n in enumerate(lengths)]


@pytest.fixture(scope="session")
def scripted_generator(make_config) -> Callable[..., Scripted]:
    """A callable: the model that says a script of a tokenizer's ids."""

    def make(tokenizer: Tokenizer, script: list[int]) -> Scripted:
        stop_ids = (tokenizer.eos_id,)
        generator = Generator(_scripted_apply, make_config(), tokenizer, stop_ids)
        return Scripted(generator, script)

    return make


# No piece is a whole "é" or "😀".
PIECES = [b"a", b"b", b"c", b"e", b"h", b"\xc3", b"\xa9", b" ", b"\xf0\x9f", b"\x98"]
PIECES += [b"\x80", b"o", b"n", b", ", b"xyz", b"pie"]


@pytest.fixture(scope="session")
def scripted(scripted_generator) -> Callable[[list[bytes]], Scripted]:
    """A callable: the model that says some of PIECES, then ends the text."""
    shared = scripted_generator(pieces_tokenizer(PIECES), [])

    def make(pieces: list[bytes]) -> Scripted:
        script = [PIECES.index(piece) for piece in pieces] + [len(PIECES)]
        return shared._replace(script=script)

    return make


class Stories(NamedTuple):
    """The trained model stories260K, its tokenizer and its parameters."""

    config: object
    params: dict
    tokenizer: Tokenizer

    def model(self) -> LanguageModel:
        mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
        return LanguageModel(self.config, self.params, self.tokenizer, mesh)

    def generator(self, *stop_ids: int) -> Generator:
        apply = make_llama(self.config).apply
        return Generator(apply, self.config, self.tokenizer, stop_ids)


@pytest.fixture(scope="session")
def stories(data_dir) -> Stories:
    model = relax.load(data_dir / "stories260K_hf")
    return Stories(model.config, model.params, model.tokenizer)


@pytest.fixture(scope="session")
def sampled() -> SamplingConfig:
    """Every filter at work, and a seed with which the end of text comes up."""
    return SamplingConfig(
        max_new_tokens=23,
        temperature=0.8,
        top_k=20,
        top_p=0.9,
        min_p=0.02,
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        seed=39,
        ignore_eos=True,
    )


@pytest.fixture(scope="session")
def greedy() -> SamplingConfig:
    return SamplingConfig(temperature=0.0, max_new_tokens=23, ignore_eos=True)
