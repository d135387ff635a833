"""Supervised fine-tuning: next-token prediction over the targets of records."""

import logging

import jax
import rich.console

from relax.data.example_batches import ExampleBatches, validation_examples
from relax.data.examples import Examples, encode_examples
from relax.data.inspection import show_rows
from relax.data.records import Records
from relax.data.sources import load_records, records_key
from relax.model.llama import make_llama
from relax.rewards import RewardScorer, find_reward
from relax.sharding import make_constrain
from relax.steps import make_language_model_loss
from relax.text.chat import TEMPLATES
from relax.trainers.common import check_sizes, make_validation, optimisation
from relax.trainers.config import Setup, check_seed
from relax.trainers.evaluation import (
    completion_metrics,
    make_completion_evaluation,
    prompts_that_fit,
)
from relax.trainers.loop import Evaluation, Task
from relax.trainers.prompts import Prompt, asks
from relax.trainers.sampler import Sampler

logger = logging.getLogger(__name__)

INSPECTED_ROWS = 4


def make_task(setup: Setup) -> Task:
    """Returns what the loop needs to fine-tune on the setup's records.

    Raises ValueError where sizes don't fit, or the records can't be trained on.
    """
    check_sizes(setup)
    check_seed(setup.sampling)
    trainer, model = setup.trainer, setup.model
    records = load_records(setup.data)
    complete, names = _make_completion(setup, records)
    batches = _training_batches(setup, records)
    apply = make_llama(model, make_constrain(setup.mesh)).apply
    loss_fn = make_language_model_loss(
        apply,
        model.vocab_size,
        z_loss_weight=trainer.z_loss,
        max_logits=trainer.max_logits,
        label_smoothing=trainer.label_smoothing,
        neftune_alpha=trainer.neftune_alpha,
        with_entropy=True,
    )
    return Task(
        **optimisation(setup, loss_fn),
        batch_at=batches.__getitem__,
        tokens_at=batches.tokens_at,
        evaluate=_make_evaluate(setup, records, loss_fn, complete),
        evaluates=("val_loss", "val_accuracy", *names),
        data_key=records_key(setup.data),
    )


def inspect(setup: Setup) -> None:
    """Shows the first rows that would be trained on."""
    batches = _training_batches(setup, load_records(setup.data))
    show_rows(batches[0], setup.tokenizer, rich.console.Console(), INSPECTED_ROWS)


def _training_batches(setup: Setup, records: Records) -> ExampleBatches:
    trainer = setup.trainer
    examples = _encode(setup, records.train)
    batches = ExampleBatches(
        examples,
        batch_size=trainer.batch_size,
        context=trainer.context,
        packing=setup.data.packing,
        seed=setup.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        trim=trainer.steps_per_dispatch == 1,  # those of a dispatch are as long
    )
    logger.info(
        "data: %d records from %s in %d rows of up to %d, %.1f%% padding",
        len(records.train),
        records.source,
        batches.rows_per_epoch,
        trainer.context,
        100 * batches.padding_share,
    )
    if examples.truncated:
        logger.warning(
            "data: %d of %d records are longer than %d tokens and are cut at their end",
            examples.truncated,
            len(records.train),
            trainer.context + 1,
        )
    return batches


def _encode(setup: Setup, records, first_index: int = 0) -> Examples:
    return encode_examples(
        records,
        setup.tokenizer,
        setup.template,
        setup.data.loss_on,
        setup.trainer.context + 1,  # the last token is a target only
        as_messages=setup.data.template is not None,
        template_names=TEMPLATES,
        cache=setup.data.cache,
        first_index=first_index,
    )


def _make_completion(setup: Setup, records: Records):
    """Returns params -> Evaluation of completions, and the names of its metrics.

    Of nothing where none is wanted, or no held-out record has a prompt that fits: what
    is completed is a by-product, which must not refuse a run. Raises ValueError where
    no records are held out.
    """
    trainer = setup.trainer
    scorer = None
    if trainer.eval_prompts and trainer.eval_reward is not None:
        find_reward(trainer.eval_reward, "trainer.eval_reward")
        scorer = RewardScorer([trainer.eval_reward])
    prompts = _held_out(setup, records) if trainer.eval_prompts else []
    if not prompts:
        return (lambda params: Evaluation({})), ()
    sampler = Sampler(setup)
    sampler.check(setup.sampling)
    complete = make_completion_evaluation(setup, sampler, prompts, scorer)
    return complete, completion_metrics(setup)


def _held_out(setup: Setup, records: Records) -> list[Prompt]:
    """Returns the held-out prompts to complete; logs where there are none."""
    held_out = records.validation
    asking = (asks(held_out[index]) for index in range(len(held_out)))
    if len(held_out) and not any(asking):
        logger.info("data: plain texts ask nothing, so no prompts are completed")
        return []
    return prompts_that_fit(setup, records, setup.trainer.eval_prompts)


def _make_evaluate(setup: Setup, records: Records, loss_fn, complete):
    """Returns params -> loss over the held-out records, and their completions."""
    if not len(records.validation):
        return None
    trainer = setup.trainer
    examples = _encode(setup, records.validation, len(records.train))

    def batches():
        return validation_examples(
            examples,
            batch_size=trainer.eval_batch_size,
            context=trainer.context,
            packing=setup.data.packing,
        )

    batches()  # raises where no record has a target
    validate = make_validation(setup, loss_fn, batches)

    def evaluate(params) -> Evaluation:
        total, completed = validate(params), complete(params)
        metrics = {
            "val_loss": total["loss"] / total["weight"],
            "val_accuracy": total["mean_token_accuracy"] / total["weight"],
        }
        return Evaluation(metrics | completed.metrics, completed.samples)

    return evaluate
