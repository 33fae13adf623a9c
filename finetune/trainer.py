"""CPMTrainer: the HuggingFace Trainer with this toolkit's loss and its LoRA files.

    trainer = CPMTrainer(model=model, args=args, train_dataset=dataset, data_collator=data_collator,
                         processing_class=tokenizer)

Labels arrive shifted from the dataset. Shapes: B samples, L tokens, K supervised tokens of the batch, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from heapq import heappop, heapreplace
from html import escape
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length, rotate_checkpoints

if not __package__:  # `import trainer` from inside finetune/, as the original's scripts did
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.bad_samples import BadSamples
from finetune.checkpoints import copy_processor, fault, lacking, written_aside
from finetune.dataset import Problem, Repeated, SampleError, SupervisedDataset, data_collator
from finetune.deepspeed_file import saving_models
from finetune.errors import UserError, is_main_of_node, over_processes
from finetune.flags import NOT_FOR_THE_TRAINER, REFUSED
from finetune.generation import Answered, Predictor, metrics_of
from finetune.guards import EvaluationLeft, Guard, explained
from finetune.loaders import Lifeline
from finetune.loading import EXTRA_WEIGHTS_NAME, checkpoint_folder, load_extra_tensors, read_extra_tensors
from finetune.machines import name_deepspeeds_step, whole_state_dict, write_on_each_node
from finetune.metrics import METRICS
from finetune.minicpmv import MiniCPMV
from finetune.minicpmv.conversation import IGNORE_INDEX
from finetune.model_card import CARD, is_edited, write_card
from finetune.recompute import recompute
from finetune.reporting import write_settings
from finetune.result_folder import lacking_in_result
from finetune.resume import apply_settings, find_best, run_folder, settings_of_groups, step_problem
from finetune.safe_files import no_code_from_files
from finetune.waiting import Taken
from finetune.zero import GROUP_ELEMENTS, LightZeroStep, split_param_groups

logger = logging.getLogger("finetune")

FUSED_BIAS = re.compile(r"\.(in_proj_bias|qkv\.bias)$")  # of queries, keys and values
VISION_TOWER = re.compile(r"(^|\.)vpm\.")
NOT_FOR_THE_MODEL = ("labels", "ids", "bad")  # of a batch
ANSWERS_SHOWN = 8  # at each evaluation, in TensorBoard
SHOWN_TEXT = 500  # characters of each


def token_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross entropy summed over supervised tokens, divided by their number in the whole optimizer step.

    Args:
        outputs: `logits` (K, V), or (B, L, V) with `labels` (B, L); or None and `loss`, summed already.
        labels: already shifted, -100 where nothing is asked.
        num_items_in_batch: supervised tokens of the step over all ranks and accumulation steps; None: of this batch.
    """
    labels = labels.flatten()
    if outputs.logits is None:
        total = outputs.loss
    else:
        logits = outputs.logits.flatten(0, -2).float()
        labels = labels.to(logits.device)
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORE_INDEX).sum()
    return total / torch.as_tensor(num_items_in_batch).clamp(min=1)


class CPMTrainer(Trainer):
    """Trains any module with `forward(data=...) -> .logits`, always through the wrapped model (DDP, DeepSpeed).

    With `MiniCPMV`, plain or under PEFT, `lm_head` is applied to supervised positions only. What LoRA runs train
    beside the adapter is written to `vpm_resampler_embedtokens.pt` in every checkpoint and read back on resume.

    Args:
        continued_adapter: adapter folder that training began from. What its `vpm_resampler_embedtokens.pt` holds and
            this run keeps frozen is written again, so that the new folder is complete.
        settings: what `training_settings.json` shall say, beside every saved model.
        bad_samples: what to do about samples that turn out to be bad while the run lasts; None: their SampleError ends
            it, with a checkpoint.
        group_elements: with ZeRO-1 and 2, most elements of a parameter group; None: groups as Trainer makes them. A
            checkpoint can be resumed only with what it was saved with.
        processing_class: the tokenizer, saved with every model. Trainer does not get it, or it would write its special
            tokens into the model's settings (for 2.5 the pad token "!", where the model has none).
        args, kwargs: as for Trainer.
    """

    def __init__(
        self,
        *args,
        processing_class: PreTrainedTokenizerBase | None = None,
        continued_adapter: str | os.PathLike | None = None,
        group_elements: int | None = GROUP_ELEMENTS,
        settings: Mapping | None = None,
        bad_samples: BadSamples | None = None,
        **kwargs,
    ):
        config = getattr(kwargs.get("model", args[0] if args else None), "config", None)
        use_cache = getattr(config, "use_cache", None)
        if len(args) < 3:  # the third of Trainer's
            kwargs["data_collator"] = kwargs.get("data_collator") or data_collator
        super().__init__(*args, **kwargs)
        for name in NOT_FOR_THE_TRAINER:
            if getattr(self.args, name, None):
                raise UserError(f"{name}: {REFUSED[name].why}")
        self.args.remove_unused_columns = False  # transformers' default is true: of a batch nothing would be left
        if use_cache is not None:
            config.use_cache = use_cache  # Trainer turns it off for good, though training says use_cache=False itself
        self.tokenizer = processing_class
        self.settings = settings
        self.bad_samples = bad_samples
        self._resumed: Path | None = None  # the checkpoint that training goes on from
        self._failure: Callable[[], Exception] | None = None  # what the run ends with once its checkpoint is saved
        self._lifeline: Lifeline | None = None  # of the loaders' processes
        self._aside: Path | None = None  # where a checkpoint is being written
        self._best_loaded = False  # at the end of the run
        self._saved_step: int | None = None  # of the newest checkpoint
        self._result_step: int | None = None  # of the result in output_dir
        self.group_elements = group_elements
        self.continued_adapter = continued_adapter
        self.compute_loss_func = self.compute_loss_func or token_loss
        self.model_accepts_loss_kwargs = False  # the loss is computed here, the model gets `data` alone
        if not self.label_names:
            self.label_names = ["labels"]
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if self.args.save_on_each_node:
            write_on_each_node(base)
        self._takes_logits_index = isinstance(base, MiniCPMV)
        self._slice_cost = slice_cost(base) if self._takes_logits_index else None
        still_key_biases(self.model)
        self._full_logits_wanted = False
        self._evaluated: list[torch.Tensor] | None = None  # (2,) of each batch: its loss summed, its supervised tokens
        self._fill_from: int | None = None  # places from which on an evaluation's samples fill up
        if self._zero_stage == 3:
            config = self.accelerator.deepspeed_plugin.deepspeed_config
            config.update(saving_models(config))
        self.add_callback(Checkpointing(partitioned=self._zero_stage == 3))
        if self._zero_stage in (1, 2):
            self.add_callback(LightZeroStep())
        self.predictor: Predictor | None = None
        if getattr(self.args, "predict_with_generate", False):
            args = self.args
            self.predictor = Predictor(
                *(self.eval_dataset, args.predict_samples, args.per_device_eval_batch_size),
                *(args.predict_max_new_tokens, args.dataloader_num_workers),
            )
        self.guard = Guard(getattr(self.args, "max_bad_steps", 3))
        self.add_callback(self.guard)
        self.add_callback(BeforeFirstStep(self))

    def train(self, *args, **kwargs):
        """As in Trainer. A signal ends it after a step, or while it waits for data, with a checkpoint; then
        `guard.signal` is set. Whatever lies in the checkpoint to resume, no code of it is executed.

        Raises:
            UserError, SampleError: of a bad sample, when the checkpoint of the last finished step is saved.
        """
        self._saved_step = self._result_step = self._failure = None
        watched = explained(self.guard, self.args, getattr(self.model, "config", None))
        try:
            with watched, no_code_from_files(self.is_deepspeed_enabled), _without_word_of_no_sample():
                result = super().train(*args, **kwargs)
        finally:
            self._end_loaders()
            self.guard.restore_handlers()
        if self._failure is not None:
            raise self._failure()
        return result

    def get_train_dataloader(self):
        """As in Trainer; loader processes leave signals to the training process, and end with it. accelerate tells the
        sampler of every epoch, and of the one that a resumed run begins in, where the loader was given it."""
        loader = super().get_train_dataloader()
        if isinstance(loader.batch_sampler, BatchSamplerShard):
            loader.set_sampler(loader.batch_sampler.batch_sampler.sampler)
        self._hold(loader)
        return loader

    def get_eval_dataloader(self, *args, **kwargs):
        """Likewise; the loader's own draw does not change what training draws."""
        loader = super().get_eval_dataloader(*args, **kwargs)
        self._hold(loader).generator = torch.Generator()
        return loader

    def _hold(self, loader) -> DataLoader:
        """Tie the loader's processes to the run; torch's loader, where accelerate's is around it."""
        loader = getattr(loader, "base_dataloader", loader)
        self._lifeline = self._lifeline or Lifeline()
        self._lifeline.give_to(loader)
        return loader

    def _end_loaders(self) -> None:
        """End all loader processes, and forget the evaluations' loaders that Trainer keeps in a private attribute with
        `--dataloader_persistent_workers`: they would wait for theirs."""
        if self._lifeline is not None:
            self._lifeline.close()
            self._lifeline = None
        vars(self).pop("_eval_dataloaders", None)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, *args, **kwargs):
        """As in Trainer, when all processes have their batches. Where one has not, over a signal or a bad sample, there
        are none in any of them: Trainer then ends the epoch, the guard the run, with the checkpoint of the last step.
        Trainer's own sum over the processes would wait for one that has met an exception."""
        step = f"the samples of step {self.state.global_step + 1}"
        fetched = self._fetched(lambda: list(islice(epoch_iterator, num_batches)), "train", step)
        batches, items = super().get_batch_samples(iter(fetched or ()), num_batches, *args, **kwargs)
        if batches:
            self.guard.begin_step(batches)
        return batches, items

    def _fetched(self, take: Callable[[], list], split: str, what: str) -> list | None:
        """The batches that `take` waits for, in all processes, which agree on it; None in all of them where the run
        ends instead.

        Args:
            split: `train` or `eval`.
            what: the batches are, in words.
        """
        if self.guard.leaving:
            return None
        batches, error = None, None
        try:
            batches = self.guard.fetch(take, what, self._end_loaders)
        except SampleError as met:
            error = met
        bad = [problem for batch in batches or () for problem in batch.get("bad") or ()]
        if self.bad_samples is not None:
            bad = self.bad_samples.unknown(split, bad)
        signalled, bad_anywhere = self.guard.anywhere(bool(bad) or error is not None)
        if bad_anywhere:
            self._failure = self._failure_over(split, bad, error)
        if not signalled and self._failure is None:
            return batches
        if self.is_in_train:
            self.guard.leave(self.state, self.control, self.model)
        return None

    def _failure_over(
        self, split: str, bad: Sequence[Problem], error: SampleError | None
    ) -> Callable[[], Exception] | None:
        """What makes the error that the run ends with, called when its checkpoint is saved; None: it goes on. All
        processes must call both."""
        raised = [message for message in over_processes(error and str(error)) if message]
        if raised or self.bad_samples is None:
            message = raised[0] if raised else str(next(filter(None, over_processes(bad)))[0])
            return lambda: error or UserError(message)
        ends = self.bad_samples.see(split, bad)
        return partial(self.bad_samples.error, self.state.global_step) if ends else None

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.guard.see_loss(loss)
        return loss

    def _get_grad_norm(self, *args, **kwargs) -> torch.Tensor | float | None:
        """As in Trainer; AdamW then leaves out a step whose gradients are not finite, as DeepSpeed does, rather than
        spoil the weights. `found_inf` is how torch's GradScaler tells the fused optimizers, without waiting for the
        device. Overrides a private method, since no callback is given the norm."""
        norm = super()._get_grad_norm(*args, **kwargs)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if fused and isinstance(norm, torch.Tensor) and not self.is_deepspeed_enabled and not self.accelerator.scaler:
            optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(norm)).float()
        return norm

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: str | None, *args
    ) -> tuple[int, int]:
        """As in Trainer; a run that is resumed logs, evaluates and saves as its flags say now, and with all its steps
        behind it takes no further one, which a warning says. Trainer (5.17 to 5.24) keeps the flags of the checkpoint,
        takes a step where the last one lies within an epoch, and has no public place before its first step.

        Raises:
            UserError: when the checkpoint is one of a later step than the last.
        """
        place = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, *args)
        self._resumed = None if checkpoint is None else Path(checkpoint).resolve()
        self._steps_per_epoch = steps_per_epoch
        self.state.compute_steps(self.args, max_steps)
        if checkpoint is None:
            return place
        find_best(self.state, self.args, checkpoint)
        step = self.state.global_step
        if problem := step_problem(step, max_steps, self.args, checkpoint):
            raise UserError(problem)
        if step < max_steps:
            return place
        if is_main_of_node():
            logger.warning("%s: is at the last step, %d: none is left to take", checkpoint, step)
        return epochs, 0

    @property
    def _zero_stage(self) -> int | None:
        """0 to 3; None without DeepSpeed."""
        return self.accelerator.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else None

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """As in Trainer; the vision tower in groups of its own where it has a learning rate of its own, and for ZeRO-1
        and 2 in groups of a limited size, see `zero.py`."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = getattr(self.args, "vision_learning_rate", None)
        if rate is not None:
            give_own_rate(
                optimizer, [p for name, p in self.model.named_parameters() if VISION_TOWER.search(name)], rate
            )
        by_file = not hasattr(optimizer, "param_groups")  # DeepSpeed makes it, of the "optimizer" block of its file
        if self._zero_stage in (1, 2) and self.group_elements and not by_file:
            split_param_groups(optimizer, self.group_elements)
        return optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
        """The Trainer's own, on `data` and the labels of the positions whose logits are computed. In an evaluation the
        mean over the batch's own supervised tokens, which `evaluation_loop` weighs by their number."""
        labels = inputs["labels"]
        if self._evaluated is not None:
            kwargs["num_items_in_batch"] = None
        wrapped = {"data": {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}}
        if self._takes_logits_index:
            wrapped["use_cache"] = False
            if not self._full_logits_wanted:
                index = inputs.get("label_index")
                if index is None:
                    index = torch.nonzero(labels.flatten() != IGNORE_INDEX).flatten()
                labels = labels.flatten()[index]
                wrapped["logits_index"] = index
                if self.compute_loss_func is token_loss:
                    wrapped["targets"] = labels
        return super().compute_loss(model, {**wrapped, "labels": labels}, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """As in Trainer, which would group by length by decoding every sample; `lengths` of the data set tell without.
        Several processes take the steps that one would, see `WholeSteps`, and about the same work in each, see
        `BalancedSteps`.

        A private method, since Trainer has no public place for a sampler."""
        dataset, args = self.train_dataset if train_dataset is None else train_dataset, self.args
        at_once = args.train_batch_size * args.world_size
        if args.train_sampling_strategy == "group_by_length" and getattr(dataset, "lengths", None) is not None:
            step = at_once * args.gradient_accumulation_steps
            sampler = EpochLengthSampler(step, lengths=dataset.lengths, seed=args.seed)
        else:
            sampler = super()._get_train_sampler(train_dataset)
        if sampler is None or args.world_size == 1:
            return sampler
        if type(sampler) is RandomSampler:  # as accelerate does for samplers that it knows
            seed = args.seed if args.data_seed is None else args.data_seed
            sampler = SeedableRandomSampler(dataset, data_seed=seed)
        if not args.dataloader_drop_last:
            sampler = WholeSteps(sampler, at_once)
        loads, of_process = getattr(dataset, "loads", None), args.train_batch_size * args.gradient_accumulation_steps
        if loads is None or self._slice_cost is None or of_process == 1:
            return sampler
        costs = loads[:, 0] + loads[:, 1] * self._slice_cost
        return BalancedSteps(sampler, costs, args.train_batch_size, args.world_size, args.gradient_accumulation_steps)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        """In order, every sample once: what would be left over or filled up at the end is filled up with `Repeated`
        ones, which count nothing. A private method, see `_get_train_sampler`."""
        if not has_length(eval_dataset):
            return None
        sampler, at_once = SequentialSampler(eval_dataset), self.args.eval_batch_size * self.args.world_size
        return WholeSteps(sampler, at_once) if self._fills_up else sampler

    @property
    def _fills_up(self) -> bool:
        """Whether the last batches of an evaluation are filled up."""
        return self.args.world_size > 1 or self.args.dataloader_drop_last

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Full-vocabulary logits (B, L, V) are computed only where the caller wants predictions."""
        self._full_logits_wanted = not prediction_loss_only
        if self._evaluated is not None and self._fill_from is not None:
            inputs = self._without_fill(inputs)
        try:
            loss, *predictions = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        finally:
            self._full_logits_wanted = False
        if loss is not None and self._evaluated is not None and "labels" in inputs:
            supervised = (inputs["labels"] != IGNORE_INDEX).sum().to(loss.device)
            self._evaluated.append(torch.stack([loss.float() * supervised, supervised.float()]))
        return loss, *predictions

    def _without_fill(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch of an evaluation, nothing supervised in what fills it up behind the last sample of the data set."""
        labels, args = inputs["labels"], self.args
        first = (len(self._evaluated) * args.world_size + args.process_index) * args.eval_batch_size
        if first + len(labels) <= self._fill_from:
            return inputs
        labels = labels.clone()
        labels[max(self._fill_from - first, 0) :] = IGNORE_INDEX
        return {**{name: value for name, value in inputs.items() if name != "label_index"}, "labels": labels}

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in Trainer, but for two things, done before anything is logged or compared with the best. The loss is the
        mean over all supervised tokens, where Trainer's is a mean of batches. With `--predict_with_generate` the
        metrics of generated answers stand beside it."""
        self.guard.evaluating, self._evaluated = True, []
        # Our data set masks what fills up its last batches; others do not know of it.
        dataset = getattr(dataloader, "dataset", None)
        known = isinstance(dataset, SupervisedDataset) or not has_length(dataset)
        self._fill_from = None if known or not self._fills_up else len(dataset)
        try:
            taken = Taken(dataloader, self._fetched_to_evaluate)
            output = super().evaluation_loop(taken, *args, metric_key_prefix=metric_key_prefix, **kwargs)
            if f"{metric_key_prefix}_loss" in output.metrics:
                output.metrics[f"{metric_key_prefix}_loss"] = _mean_over_processes(self._evaluated)
        finally:
            self._evaluated = None
        if self.predictor is not None and getattr(dataloader, "dataset", None) is self.predictor.dataset:
            start = time.perf_counter()
            with self.accelerator.autocast():
                show_progress = self.is_world_process_zero() and not self.args.disable_tqdm
                answered = self.predictor(self.model, show_progress, self._fetched_to_evaluate)
            scores = metrics_of(answered) if answered else {}  # all of them may be of masked samples
            metrics = {**scores, "generation_seconds": round(time.perf_counter() - start, 2)}
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
            if answered:
                self._show_answers(answered)
        self.guard.evaluating = False
        return output

    def _fetched_to_evaluate(self, take: Callable[[], list]) -> list:
        """As `_fetched`, for a batch of an evaluation, of which all processes have the same number.

        Raises:
            EvaluationLeft: in all processes, within training, which a resumed run makes up for.
            UserError, SampleError: of a bad sample, outside of training.
        """
        batches = self._fetched(take, "eval", "the samples of an evaluation")
        if batches is not None:
            return batches
        self.guard.evaluating = False
        if not self.is_in_train:
            raise self._failure()
        raise EvaluationLeft

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """As in Trainer; of evaluations whose answers score the same, the one with the least loss is the best, where
        Trainer keeps the first. A private method, since Trainer has no public place to compare evaluations."""
        if not metrics:  # of an evaluation that was left
            return False
        if super()._determine_best_metric(metrics, trial):
            return True
        name = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if name not in METRICS or metrics[f"eval_{name}"] != self.state.best_metric:
            return False
        losses = {entry["step"]: entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry}
        if not metrics["eval_loss"] < losses.get(self.state.best_global_step, float("-inf")):
            return False
        self.state.best_metric = None
        return super()._determine_best_metric(metrics, trial)

    def _show_answers(self, answered: Sequence[Answered]) -> None:
        """Some answers, evenly spread, as text in TensorBoard."""
        shown = [answered[place] for place in range(0, len(answered), -(-len(answered) // ANSWERS_SHOWN))]
        for callback in self.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)  # of the first process alone
            if writer is not None and hasattr(writer, "add_text"):
                writer.add_text("eval/answers", answers_table(shown), self.state.global_step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; the result is written aside and moved to its place when it is whole.

        For LoRA at ZeRO-0, 1 and 2, where rank 0 holds all that is saved, without Trainer's copy of the whole frozen
        model into the host memory of every rank. At ZeRO-3 on disks of each node's own, where Trainer gives the weights
        to the first node alone, in every node's folder.
        """
        if output_dir is None and _internal_call and self._result_step == self.state.global_step:
            return  # push_to_hub, of what lies there already
        if output_dir is None or not _internal_call:
            folder = Path(output_dir or self.args.output_dir)
            with written_aside(folder, self.args.should_save, into=True, lacks=lacking_in_result) as aside:
                self.save_model(str(aside), _internal_call=True)
                if self.args.should_save and is_edited(folder / CARD):
                    (aside / CARD).unlink()
            if output_dir is None:
                self._result_step = self.state.global_step
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        elif isinstance(self.model, PeftModel) and self._zero_stage in (0, 1, 2):
            self._save(output_dir)
        elif self._zero_stage == 3 and self.args.save_on_each_node:
            peft = isinstance(self.model, PeftModel)
            self._save(output_dir, whole_state_dict(self.deepspeed, keep=self.args.should_save, trained_only=peft))
        else:
            super().save_model(output_dir, _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in Trainer; a LoRA run also writes every trained tensor that is no LoRA matrix. The README.md of PEFT is
        replaced by our own; one that the user wrote stays."""
        folder = Path(output_dir or self.args.output_dir)
        edited = (folder / CARD).read_text(encoding="utf-8") if is_edited(folder / CARD) else None
        super()._save(output_dir, state_dict)
        if self.tokenizer is not None and self.args.should_save:
            self.tokenizer.save_pretrained(folder)
        if isinstance(self.model, PeftModel) and self.args.should_save:
            extra = read_extra_tensors(self.continued_adapter) if self.continued_adapter else {}
            extra.update(extra_trained_tensors(self.model, state_dict))
            torch.save(extra, folder / EXTRA_WEIGHTS_NAME)
        if self.settings is not None and self.args.should_save:
            write_settings(self.settings, folder)
        if self.args.should_save:
            if edited is not None:
                (folder / CARD).write_text(edited, encoding="utf-8")
            else:
                (folder / CARD).unlink(missing_ok=True)
                self.create_model_card(output_dir=folder)
            if not isinstance(self.model, PeftModel):
                self._copy_processor(folder)

    def _copy_processor(self, folder: Path) -> None:
        """What other programs prepare pictures with, from the checkpoint that training began from."""
        if not isinstance(self.model, MiniCPMV):
            return
        try:
            base = checkpoint_folder(self.model.name_or_path, getattr(self.args, "cache_dir", None), download=False)
        except (OSError, ValueError):  # a model made in this process, or a hub name that is not in the cache
            return
        copy_processor(base, folder, self.model.config.slicing["max_slice_nums"])

    def create_model_card(self, *_, output_dir: str | os.PathLike | None = None, **__) -> None:
        """Our card in the place of Trainer's, which takes what is to be on it as arguments; see `model_card.py`."""
        if self.is_world_process_zero() or self.args.save_on_each_node:
            run = Path(self.args.output_dir)
            write_card(
                output_dir or run,
                run.resolve().name,
                history=self.state.log_history,
                settings=self.settings,
                loaded_step=self.state.best_global_step if self._best_loaded and self._aside is None else None,
            )

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """As in Trainer, but written aside, checked and renamed (see `checkpoints.py`), and once for a step. Overrides
        a private method, since Trainer has no public place around the whole of a save."""
        step = self.state.global_step
        run_dir = Path(super()._get_output_dir(trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if step == self._saved_step or folder.resolve() == self._resumed:
            return
        needed = partial(lacking, resumable=not self.args.save_only_model)
        with written_aside(folder, self.args.should_save, lacks=needed) as aside:
            self._aside = aside.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = None
            if self.state.best_model_checkpoint == str(aside):
                self.state.best_model_checkpoint = str(folder)
                if self.args.should_save:
                    self.state.save_to_json(str(aside / TRAINER_STATE_NAME))
        self._saved_step = step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,  # as Trainer does
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # else Trainer asks for it before the checkpoint is in its place
            if self.tokenizer is not None and self.is_world_process_zero():
                self.tokenizer.save_pretrained(self.args.output_dir)
            super()._push_from_checkpoint(checkpoint_folder)

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def create_scheduler(self, *args, **kwargs) -> LRScheduler:
        """As in Trainer, which calls it when nothing of a checkpoint is loaded yet."""
        scheduler = super().create_scheduler(*args, **kwargs)
        names = self.get_optimizer_cls_and_kwargs(self.args, self.model)[1]
        self._asked = settings_of_groups(kwargs.get("optimizer") or self.optimizer, names)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in Trainer; rates, schedule and the optimizer's settings are then those of the flags, see `resume.py`. A
        private method, since Trainer has no public place behind the loading of a checkpoint."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            apply_settings(self.optimizer, self.lr_scheduler, self._asked)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in Trainer; on disks of each node's own, with the file that DeepSpeed writes on the first node alone. A
        private method, since that file belongs to the checkpoint before it is complete; see `name_deepspeeds_step`."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_deepspeed_enabled and self.args.save_on_each_node and self.args.should_save:
            name_deepspeeds_step(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with warnings.catch_warnings():
            # config.json has this field of the hub, for other programs; Trainer reads it as a plain PreTrainedConfig.
            warnings.filterwarnings("ignore", "`rope_scaling` is deprecated", FutureWarning)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_extra_tensors(self.model if model is None else model, resume_from_checkpoint)

    def _finalize_training(self, *args, **kwargs):
        """As in Trainer. A run that a signal or a bad sample stopped is not over: its best checkpoint is not loaded,
        and Trainer does not remove the newest for it. A private method, since Trainer has no public place between its
        last step and this."""
        best = self.state.best_model_checkpoint
        if self.guard.signal or self.guard.leaving or (best is not None and not self._can_be_loaded(best)):
            self.state.best_model_checkpoint = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.state.best_model_checkpoint = best

    def _can_be_loaded(self, best: str) -> bool:
        """Whether the best checkpoint is still there for all processes; a warning where it is not."""
        why = next(filter(None, over_processes(fault(Path(best)))), None)
        if why is not None and self.args.load_best_model_at_end:
            logger.warning("the best checkpoint, %s, cannot be loaded (%s): the last step is the result", best, why)
        return why is None

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in Trainer; without the mean loss of no step, where a finished run was resumed."""
        if self.state.global_step == getattr(self, "_initial_global_step", None):
            logs = {name: value for name, value in logs.items() if name != "train_loss"}
        super().log(logs, *args, **kwargs)

    def _evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As in Trainer; {} where it was left. A private method, since Trainer goes on with what it returns."""
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationLeft:
            return {}

    def make_up_evaluation(self) -> None:
        """Before the first step of a resumed run: the evaluation that was due at the checkpoint's step, where the
        signal that stopped the run came before it."""
        args, step, steps_per_epoch = self.args, self.state.global_step, self._steps_per_epoch
        every = {"steps": self.state.eval_steps, "epoch": steps_per_epoch}.get(args.eval_strategy)
        delay = (args.eval_delay or 0) * (steps_per_epoch if args.eval_strategy == "epoch" else 1)
        if not every or not step or step % every or step < delay:
            return
        logged = chain.from_iterable(entry for entry in self.state.log_history if entry["step"] == step)
        if any(name.startswith("eval_") for name in logged):
            return
        if self._determine_best_metric(self._evaluate(None, None), None):
            best = run_folder(self._resumed, args) / self._resumed.name
            self.state.best_model_checkpoint = str(best)  # Trainer names it where it saves, which was before

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._best_loaded = True
        if not self.is_deepspeed_enabled:
            load_extra_tensors(self.model, self.state.best_model_checkpoint)


def _mean_over_processes(sums: Sequence[torch.Tensor]) -> float:
    """The first numbers over the second ones, each added up over all processes.

    Args:
        sums: this process's, (2,) each, on any device.
    """
    own = torch.stack(list(sums)).cpu().double().sum(dim=0).tolist() if sums else (0.0, 0.0)
    total, count = map(math.fsum, zip(*over_processes(own), strict=True))
    return total / max(count, 1.0)


def still_key_biases(model: nn.Module) -> None:
    """Give biases of attention keys the gradient that they have: none. They add the same to a query's score of every
    key, which softmax takes out again. What is computed for them is rounding, another at every layout, which Adam would
    divide by its own size: they would move by the learning rate in every step."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim == 1:
            if name.endswith("k_proj.bias"):
                parameter.register_hook(torch.zeros_like)
            elif FUSED_BIAS.search(name):
                parameter.register_hook(_without_keys)


def _without_keys(gradient: torch.Tensor) -> torch.Tensor:
    query, key, value = gradient.chunk(3)
    return torch.cat([query, torch.zeros_like(key), value])


def give_own_rate(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], rate: float) -> None:
    """Divide an optimizer's parameter groups, in place, so that some parameters have another learning rate, which
    schedulers scale likewise. Their groups stand behind all others: the first group's rate is the one that is logged.
    """
    own = set(map(id, parameters))
    groups = []
    for group in optimizer.param_groups:
        inside = [parameter for parameter in group["params"] if id(parameter) in own]
        outside = [parameter for parameter in group["params"] if id(parameter) not in own]
        groups += [{**group, "params": outside}, {**group, "params": inside, "lr": rate}]
    optimizer.param_groups[:] = [group for group in groups[::2] + groups[1::2] if group["params"]]


@contextmanager
def _without_word_of_no_sample() -> Iterator[None]:
    """Trainer (5.17 to 5.24) takes an epoch that ends before its first batch for one of an empty data set, and says so;
    here the run is left, which is said elsewhere. To go when it asks why there is no batch."""
    logger = logging.getLogger("transformers.trainer")
    logger.addFilter(_is_no_word_of_no_sample)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_word_of_no_sample)


def _is_no_word_of_no_sample(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("There seems not to be a single sample in your epoch_iterator")


class BeforeFirstStep(TrainerCallback):
    """Makes up for an evaluation, when the checkpoint is loaded and nothing is trained yet."""

    def __init__(self, trainer: CPMTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002
        self.trainer.make_up_evaluation()


class Checkpointing(TrainerCallback):
    """Turns gradient checkpointing off for vision or language where `--vision_checkpointing` or `--llm_checkpointing`
    say so, and puts `recompute` in the place of torch's. Trainer, which knows one switch for the whole model, has
    turned it on by then.

    Args:
        partitioned: parameters are empty while their module does not run, which `recompute` cannot take.
    """

    def __init__(self, partitioned: bool):
        self.partitioned = partitioned

    def on_train_begin(self, args, state, control, model=None, **kwargs):  # noqa: ARG002
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(base, MiniCPMV):
            return
        for switch, parts in (("vision_checkpointing", ("vpm", "resampler")), ("llm_checkpointing", ("llm",))):
            if getattr(args, switch, None) is False:
                for layer in chain.from_iterable(base.get_submodule(part).modules() for part in parts):
                    if hasattr(layer, "gradient_checkpointing"):
                        layer.gradient_checkpointing = False
        own = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs
        if self.partitioned or own:  # what the user asks torch's checkpointing to do
            return
        for layer in (*base.llm.model.layers, *base.vpm.layers, base.resampler):
            random = bool(base.llm.config.attention_dropout) or any(
                isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules()
            )
            layer._gradient_checkpointing_func = partial(recompute, list(layer.parameters()), random)


def answers_table(answered: Sequence[Answered]) -> str:
    """Answers as a table in Markdown; what they hold is shown as it is."""

    def cell(text: str) -> str:
        text = text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}..."
        return " ".join(re.sub(r"([\\`*_{}\[\]()#+.!|~>-])", r"\\\1", escape(text, quote=False)).split())

    rows = [
        f"| {cell(one.question)} | {cell(one.answer.text)} | {cell(one.reference)} | {one.scores.anls:.2f} |"
        for one in answered
    ]
    return "\n".join(["| question | answer | reference | ANLS |", "|---|---|---|---|", *rows])


class AroundSampler(Sampler):
    """Passes on how many samples another sampler draws, and to it, which epoch begins."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader at the start of every epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


class WholeSteps(AroundSampler):
    """What a sampler draws, and behind it `Repeated` indices up to a multiple of what all processes take at once.
    accelerate would fill up with samples of which the model learns twice."""

    def __init__(self, sampler: Sampler, at_once: int):
        super().__init__(sampler)
        self.at_once = at_once

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.at_once) * self.at_once

    def __iter__(self) -> Iterator[int]:
        first = None
        for index in self.sampler:
            first = index if first is None else first
            yield index
        yield from [Repeated(first)] * (len(self) - len(self.sampler))


class BalancedSteps(AroundSampler):
    """What a sampler draws, the samples of each optimizer step dealt out so that all processes have about the same to
    do: the one with most keeps the others waiting. A step learns from the same samples, whoever computes them.

    Args:
        costs: of each sample of the data set, in any unit.
        batch_size: samples of a process at a time.
        accumulation: batches of a process in a step.
    """

    def __init__(self, sampler: Sampler, costs: np.ndarray, batch_size: int, processes: int, accumulation: int):
        super().__init__(sampler)
        self.costs = costs
        self.batch_size, self.processes, self.accumulation = batch_size, processes, accumulation

    def __iter__(self) -> Iterator[int]:
        drawn, at_once = iter(self.sampler), self.batch_size * self.processes
        while step := list(islice(drawn, at_once * self.accumulation)):
            whole = len(step) % at_once == 0  # else it is what --dataloader_drop_last drops
            yield from self._dealt(step) if whole else step

    def _dealt(self, step: list[int]) -> list[int]:
        """The dearest first, each to the batch with least so far, and batches of about the same cost at a time, of
        which the first process has now the dearest, now the cheapest."""
        size = self.batch_size
        batches = [(0.0, number, []) for number in range(len(step) // size)]  # a heap: the cheapest first
        full = []
        for index in sorted(step, key=self.costs.__getitem__, reverse=True):
            cost, number, batch = batches[0]
            batch.append(index)
            entry = (cost + self.costs[index], number, batch)
            if len(batch) == size:
                heappop(batches)
                full.append(entry)
            else:
                heapreplace(batches, entry)
        full.sort(reverse=True)
        for start in range(self.processes, len(full), 2 * self.processes):
            full[start : start + self.processes] = full[start : start + self.processes][::-1]
        dealt = [index for *_, batch in full for index in batch]
        return min(step, dealt, key=self._time)

    def _time(self, step: list[int]) -> float:
        """Of all batches that processes take at once, the dearest counts."""
        of_batches = self.costs[step].reshape(-1, self.processes, self.batch_size).sum(axis=2)
        return of_batches.max(axis=1).sum()


def slice_cost(model: MiniCPMV) -> float:
    """What a slice costs, in tokens of text: its own tokens, and the way of its patches through the vision tower, by
    the number of weights on each way."""

    def size(module: nn.Module) -> int:
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())

    slicing = model.config.slicing
    patches = (slicing["scale_resolution"] // slicing["patch_size"]) ** 2
    return model.config.query_num + patches * size(model.vpm) / size(model.llm.model.layers)


class EpochLengthSampler(LengthGroupedSampler):
    """Groups by length in an order that follows from seed and epoch alone, so that all processes, and a run that is
    resumed within an epoch, draw the same."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader at the start of every epoch."""
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


def extra_trained_tensors(model: PeftModel, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
    """Trained tensors that are no LoRA matrix, on the CPU, under the names of `model.state_dict()`.

    Args:
        state_dict: gathered tensors, where the model's own are partitioned (ZeRO-3).
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    tensors = dict(model.named_parameters()) if state_dict is None else state_dict
    return {name: tensors[name].detach().to("cpu", copy=True) for name in names}
