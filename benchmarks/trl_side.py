"""The other side of the training benchmark: TRL's SFTTrainer with a PEFT adapter, in torch on the CPU.

LoRA of rank 16 on all linear projections (alpha 32, no dropout), AdamW, no gradient checkpointing, attention by torch's
scaled_dot_product_attention, as many threads as cores. Examples come as token ids with labels, so no tokenizer takes part.
"""

import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from datasets import Dataset
from datasets import disable_progress_bars as disable_dataset_bars
from datasets.utils import logging as datasets_logging
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from transformers import logging as transformers_logging
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from sftrec_jax.model.export_files import save_tensors, write_json
from sftrec_jax.model.gguf_file import read_gguf
from sftrec_jax.model.hub import resolve_base

IGNORED = -100
"""The label of a token that is no target."""

Examples = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Token ids, and as many labels: the token's own id where it is a target, else -100."""


@dataclass
class Timing:
    """Some steps of the training loop, and what they trained on."""

    seconds: float = 0.0
    """From the first step's begin to the last one's end, with the loading of batches between them."""
    examples: int = 0
    tokens: int = 0
    """Without padding."""
    positions: int = 0
    """With padding."""
    targets: int = 0
    losses: list[float] = field(default_factory=list)
    """Nats a target token, of each step before its update."""


def write_base(folder: Path, base: str = "smollm2-135m") -> Path:
    """A base model that is a GGUF file, as a folder with float32 safetensors, config and tokenizer; returns `folder`.

    Raises: UserError where the weights cannot be had.
    """
    source = resolve_base(base)
    assert source.gguf is not None
    model = read_gguf(source.gguf)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors({name: model.tensor(name) for name in model.tensor_names()}, folder / "model.safetensors")
    write_json(folder / "config.json", model.config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source.tokenizer / name, folder / name)
    return folder


class TrlSide:
    """A trainer over some examples.

    Args:
        model_folder: config, safetensors and tokenizer (the trainer asks for one) in Hugging Face format.
        examples: none longer than the model's context.
        batch_examples: examples of an optimizer step.
        dtype: `float32`, or `bfloat16` for frozen weights in bfloat16 and autocast, which is TRL's default.
        layout: `padded`: batches of similar lengths (`group_by_length`), padded to the longest of `device_batch` examples.
            `padding_free`: those examples in one row, in a block-diagonal mask over the whole row: without flash
            attention, which the CPU does not have, its attention costs the square of the row.
        device_batch: examples of one pass forward and backward; divides `batch_examples`.
        head: `all` is TRL on a CPU: logits, their entropy and rank at every position. `targets` makes TRL score the targets
            alone there, too, as it does on a GPU: 1.7 times as fast for SmolLM2-135M and prompts of 100 to 300 tokens.
        attention: torch's `sdpa`, or `eager`.

    Raises: ValueError where `device_batch` does not divide `batch_examples`, or this the number of examples.
    """

    def __init__(
        self,
        model_folder: Path,
        examples: Examples,
        batch_examples: int,
        dtype: Literal["float32", "bfloat16"],
        layout: Literal["padded", "padding_free"],
        device_batch: int,
        head: Literal["all", "targets"] = "all",
        attention: Literal["sdpa", "eager"] = "sdpa",
        seed: int = 0,
    ):
        if batch_examples % device_batch or len(examples) % batch_examples or not examples:
            raise ValueError(f"{len(examples)} examples, {batch_examples} a step, {device_batch} a pass")
        _quiet()
        torch.set_num_threads(_cores())
        self.seed, self.head, self.batch = seed, head, batch_examples
        set_seed(seed)  # A of the adapters
        model = AutoModelForCausalLM.from_pretrained(
            model_folder, dtype=getattr(torch, dtype), attn_implementation=attention, local_files_only=True
        )
        self.unused = tempfile.TemporaryDirectory()  # the trainer makes an output folder, whatever it saves
        config = SFTConfig(
            output_dir=self.unused.name,
            per_device_train_batch_size=device_batch,
            gradient_accumulation_steps=batch_examples // device_batch,
            train_sampling_strategy="group_by_length" if layout == "padded" else "random",
            padding_free=layout == "padding_free",
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            bf16=dtype == "bfloat16",
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            max_steps=1,
            seed=seed,
            use_cpu=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        self.rows = [{"input_ids": list(map(int, ids)), "labels": list(map(int, labels))} for ids, labels in examples]
        self.clock = _Clock()
        self.trainer = _Trainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(self.rows),
            processing_class=AutoTokenizer.from_pretrained(model_folder, local_files_only=True),
            peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[self.clock],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.device_batch, self.warm = device_batch, False

    def first_loss(self) -> float:
        """Nats a target token over the first `batch_examples` examples in the order given, by the trainer's own loss."""
        rows, model = self.rows[: self.batch], self.trainer.model
        assert model is not None
        targets = sum(label != IGNORED for row in rows for label in row["labels"][1:])
        model.eval()
        total = 0.0
        with torch.no_grad(), self._head():
            for at in range(0, len(rows), self.device_batch):
                inputs = self.trainer.data_collator(rows[at : at + self.device_batch])
                total += float(self.trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(targets)))
        return total

    def steps(self, count: int) -> Timing:
        """`count` optimizer steps of `SFTTrainer.train`, from the sampler's first batch on.

        The first call makes one step before that, which is not timed. With as many steps as fill an epoch, every example
        is in them; with fewer, `padded` takes the longest ones first, so hold its seconds against its own tokens.
        """
        if not self.warm:
            self._train(1)
            self.warm = True
        return self._train(count)

    def _train(self, count: int) -> Timing:
        self.trainer.args.max_steps = count
        self.trainer.counted = Timing()
        self.clock.ticks = []
        set_seed(self.seed)  # of the order
        with self._head():
            self.trainer.train()
        found = self.trainer.counted
        passes = len(found.losses) // count
        found.losses = [sum(found.losses[at : at + passes]) for at in range(0, len(found.losses), passes)]
        found.seconds = self.clock.ticks[-1] - self.clock.ticks[0]
        return found

    @contextmanager
    def _head(self) -> Iterator[None]:
        # TRL 1.16 decides by this function whether to score targets alone; the kernels that follow look at their own.
        if self.head == "all":
            yield
            return
        with patch("trl.trainer.utils._use_triton", lambda device: True):
            yield


class _Trainer(SFTTrainer):
    """SFTTrainer that notes what its passes hold."""

    counted = Timing()

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self.counted.examples += len(ids) if mask is not None else int((inputs["position_ids"] == 0).sum())
        self.counted.tokens += ids.numel() if mask is None else int(mask.sum())
        self.counted.positions += ids.numel()
        self.counted.targets += int((inputs["labels"][:, 1:] != IGNORED).sum())
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.counted.losses.append(float(loss))
        return loss


class _Clock(TrainerCallback):
    """Begin and end of every optimizer step."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ticks.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ticks.append(time.perf_counter())


def _quiet() -> None:
    """No progress bars, and no advice on the log."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets_logging.set_verbosity_error()
    disable_dataset_bars()
    for name in ("transformers", "trl", "peft", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="peft|trl|transformers|torch")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
