"""Pretraining: next-token prediction over a text."""

import math
from dataclasses import replace

import jax

from relax.data.corpora import Corpus, load_corpus
from relax.data.windows import TrainingBatches, target_bytes, validation_batches
from relax.generation.generator import Generator
from relax.generation.requests import Request
from relax.model.llama import make_llama
from relax.sharding import batch_multiple, make_constrain
from relax.steps import make_language_model_loss
from relax.trainers.common import check_sizes, make_validation, optimisation
from relax.trainers.config import Setup
from relax.trainers.loop import Evaluation, Task


def make_task(setup: Setup) -> Task:
    """Returns what the loop needs to pretrain on the setup's corpus.

    Raises ValueError where the context is longer than the model's or the data, or the
    rows can't be dealt out to the mesh.
    """
    check_sizes(setup)
    trainer, model = setup.trainer, setup.model
    apply = make_llama(model, make_constrain(setup.mesh)).apply
    loss_fn = make_language_model_loss(
        apply,
        model.vocab_size,
        z_loss_weight=trainer.z_loss,
        max_logits=trainer.max_logits,
    )
    corpus = load_corpus(setup.data, setup.tokenizer)
    batches = TrainingBatches(
        corpus.train,
        batch_size=trainer.batch_size,
        context=trainer.context,
        seed=setup.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    tokens = trainer.batch_size * trainer.context
    return Task(
        **optimisation(setup, loss_fn),
        batch_at=batches.__getitem__,
        tokens_at=lambda step: tokens,
        evaluate=_make_evaluate(setup, loss_fn, corpus, _make_sample(setup, apply)),
        evaluates=("val_loss", "val_bits_per_byte", "val_accuracy"),
        data_key=corpus.key,
    )


def _make_evaluate(setup: Setup, loss_fn, corpus: Corpus, sample):
    """Returns params -> loss over the whole validation split, or None without one."""
    if len(corpus.validation) < 2:
        return None
    num_bytes = target_bytes(corpus.validation, setup.tokenizer)
    trainer = setup.trainer

    def batches():
        return validation_batches(
            corpus.validation,
            batch_size=trainer.eval_batch_size,
            context=trainer.context,
        )

    validate = make_validation(setup, loss_fn, batches)

    def evaluate(params) -> Evaluation:
        total = validate(params)
        metrics = {
            "val_loss": total["loss"] / total["weight"],
            "val_bits_per_byte": total["loss"] / math.log(2) / num_bytes,
            "val_accuracy": total["mean_token_accuracy"] / total["weight"],
        }
        return Evaluation(metrics, sample(params))

    return evaluate


def _make_sample(setup: Setup, apply):
    """Returns params -> what the model makes of the sample prompt."""
    trainer, tokenizer = setup.trainer, setup.tokenizer
    if not trainer.sample_tokens:
        return lambda params: []
    prompt, limit = trainer.sample_prompt, setup.model.max_position_embeddings
    mesh = setup.mesh
    layout = batch_multiple(mesh), make_constrain(mesh)
    generator = Generator(apply, setup.model, tokenizer, (), *layout)
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    request = Request((*first, *tokenizer.encode(prompt)), 0, 0)
    if not 1 <= len(request.prompt) < limit:
        raise ValueError(
            f"trainer.sample_prompt={prompt!r} is {len(request.prompt)} tokens; give 1 "
            f"to {limit - 1} (model.max_position_embeddings={limit}), or "
            "trainer.sample_tokens=0"
        )
    sampling = replace(setup.sampling, max_new_tokens=trainer.sample_tokens)

    def sample(params) -> list[dict]:
        completion = generator.run(params, [request], sampling)[0]
        return [{"prompt": prompt, "completion": completion.text}]

    return sample
