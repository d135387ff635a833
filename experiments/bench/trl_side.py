"""The peer's side of the benchmarks of trainers: TRL's trainers, one step at a time."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar as without_bars
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

# TRL's defaults are for a GPU: bfloat16, and activations computed twice.
ON_CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "num_train_epochs": 10_000,
}


def load(folder: Path) -> tuple[Any, Any]:
    """Returns a folder's model in float32, and its tokenizer with a token to pad by."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Mapped files have small pages: memory of its own reads faster.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model, tokenizer


def grpo(
    folder: Path, work: Path, prompts: Sequence[str], reward: Callable, config: Mapping
) -> GRPOTrainer:
    """Returns a trainer whose step takes all prompts and one update."""
    model, tokenizer = load(folder)
    generations = config["generations"]
    arguments = GRPOConfig(
        output_dir=str(work),
        per_device_train_batch_size=len(prompts) * generations,
        num_generations=generations,
        max_completion_length=config["new_tokens"],
        temperature=1.0,
        learning_rate=config["learning_rate"],
        seed=config["seed"],
        **ON_CPU,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )


def sft(folder: Path, work: Path, texts: Sequence[str], config: Mapping) -> SFTTrainer:
    """Returns a trainer whose step takes all texts, cut to the context, unpacked."""
    model, tokenizer = load(folder)
    arguments = SFTConfig(
        output_dir=str(work),
        per_device_train_batch_size=len(texts),
        max_length=config["context"],
        packing=False,
        learning_rate=config["learning_rate"],
        seed=config["seed"],
        **ON_CPU,
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{"text": text} for text in texts]),
        processing_class=tokenizer,
    )


class TRLSteps(TrainerCallback):
    """Runs a trainer in a thread of its own, which waits before each step."""

    def __init__(self, make: Callable[[], Any], threads: int):
        disable_progress_bar()
        without_bars()
        self._make, self._threads = make, threads
        self._may_go, self._is_done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ends = False
        self.metrics: dict[str, float] = {}
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def run(self) -> dict[str, float]:
        """Returns the metrics of the step before, having made one more."""
        self._may_go.release()
        self._is_done.acquire()
        if self._error is not None:
            raise self._error
        return self.metrics

    def close(self) -> None:
        """Ends the training."""
        self._ends = True
        self._may_go.release()
        self._thread.join()

    def _train(self) -> None:
        try:
            torch.set_num_threads(self._threads)  # of this thread
            trainer = self._make()
            trainer.add_callback(self)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        except BaseException as error:
            self._error = error
            self._is_done.release()

    def on_step_begin(self, args, state, control, **kwargs):
        self._may_go.acquire()
        control.should_training_stop = self._ends

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self._ends
        self._is_done.release()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.metrics = logs or {}
