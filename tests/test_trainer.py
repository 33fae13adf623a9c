"""CPMTrainer: the loss of an optimizer step, equal to plain computations; evaluation without logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from conftest import GOLDEN, GOLDEN_DATA, LLM_TYPES, PATIENCE, ROOT, golden_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from finetune.checkpoints import fault
from finetune.dataset import Repeated, SupervisedDataset, build_transform, data_collator, load_samples
from finetune.minicpmv import MiniCPMV
from finetune.trainer import BalancedSteps, CPMTrainer, WholeSteps, slice_cost, token_loss

QUERIES = {"llama3": 12, "minicpm": 16}


@pytest.fixture(params=LLM_TYPES)
def llm_type(request) -> str:
    return request.param


@pytest.fixture
def model(llm_type):
    return AutoModel.from_pretrained(GOLDEN[llm_type], dtype=torch.float32)


@pytest.fixture
def dataset(llm_type) -> SupervisedDataset:
    """Six samples with pictures of different sizes and answers of different lengths, and two of text only."""
    samples = list(load_samples(GOLDEN_DATA / "samples.json"))
    samples += [{k: v for k, v in samples[n].items() if k != "image"} for n in (1, 5)]
    for sample in samples[6:]:
        text = sample["conversations"][0]["content"].replace("<image>\n", "")
        sample["conversations"] = [{"role": "user", "content": text}, *sample["conversations"][1:]]
    return SupervisedDataset(
        samples,
        build_transform(),
        AutoTokenizer.from_pretrained(GOLDEN[llm_type]),
        {"max_slice_nums": 2, "scale_resolution": 112, "patch_size": 14},
        llm_type=llm_type,
        query_nums=QUERIES[llm_type],
        batch_vision=llm_type == "llama3",
        image_folder=GOLDEN_DATA,
    )


def test_of_answers_that_score_the_same_the_least_loss_is_the_best(tmp_path):
    model = AutoModel.from_pretrained(GOLDEN["llama3"], dtype=torch.float32)
    trainer = make_trainer(model, None, tmp_path, metric_for_best_model="exact_match", save_strategy="steps")
    found = []
    for step, score, loss in [
        (2, 0.0, 6.0),
        (4, 0.0, 5.0),
        (6, 0.0, 5.5),
        (8, 0.5, 7.0),
        (10, 0.25, 1.0),
        (12, 0.5, 6.9),
    ]:
        metrics = {"eval_exact_match": score, "eval_loss": loss}
        trainer.state.global_step = step
        trainer.state.log_history.append({**metrics, "step": step})
        trainer._determine_best_metric(metrics, None)
        found.append(trainer.state.best_global_step)
    assert found == [2, 4, 4, 8, 8, 12] and trainer.state.best_metric == 0.5


def make_trainer(model, dataset, tmp_path, **arguments) -> CPMTrainer:
    settings = {
        "output_dir": str(tmp_path),
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **arguments,
    }
    return CPMTrainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=partial(data_collator, max_length=2048),
    )


@pytest.mark.parametrize("collated", [True, False])
def test_a_notebook_needs_transformers_own_arguments_alone(collated, model, dataset, tmp_path):
    """With their defaults: they would take all columns away. The collator is ours where none is given."""
    settings = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "per_device_train_batch_size": 2}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    given = {"data_collator": data_collator} if collated else {}
    trainer = CPMTrainer(model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset, **given)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert loss == next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    plain = make_trainer(model, dataset, tmp_path / "plain")
    assert loss == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    predicted = trainer.predict(dataset)
    assert predicted.predictions.shape[:2] == predicted.label_ids.shape


ALONE = """
import sys
from transformers import TrainingArguments
from finetune.arguments import load_config
from finetune.dataset import SupervisedDataset, load_samples
from finetune.loading import load_tokenizer
from finetune.minicpmv import MiniCPMV
from finetune.trainer import CPMTrainer

base, data, config, output = sys.argv[1:]
model = MiniCPMV.from_pretrained(base)
arguments = TrainingArguments(output, deepspeed=config, max_steps=1, report_to="none", save_steps=1)
dataset = SupervisedDataset.for_checkpoint(load_config(base), load_tokenizer(base), load_samples(data), 2048)
trainer = CPMTrainer(model, arguments, train_dataset=dataset)
trainer.train()
"""


@pytest.mark.slow
def test_the_trainer_alone_saves_under_zero3(tiny, data_file, tmp_path):
    """With a DeepSpeed file whose weights would not be gathered."""
    config = json.loads((ROOT / "finetune" / "ds_config_zero3.json").read_text())
    del config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    (tmp_path / "ds.json").write_text(json.dumps(config))
    (tmp_path / "alone.py").write_text(ALONE)
    words = [tmp_path / "alone.py", tiny["llama3"], data_file, tmp_path / "ds.json", tmp_path / "out"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(map(str, command), env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr[-3000:]
    assert fault(tmp_path / "out" / "checkpoint-1") is None
    saved = MiniCPMV.from_pretrained(tmp_path / "out" / "checkpoint-1")
    assert all(parameter.numel() for parameter in saved.parameters())


def test_the_programs_begin_without_deepspeed(tmp_path):
    """It is needed where a DeepSpeed file is given, and cannot be installed everywhere."""
    look = """
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "deepspeed" else find(name, *rest)
import sys
sys.modules["deepspeed"] = None
from finetune import chat, evaluate, finetune, inspect_data, merge_lora
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", look]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


def test_smoothed_labels_are_refused(model, dataset, tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor: the loss is plain"):
        make_trainer(model, dataset, tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_loss_at_supervised_positions_equals_the_full_computation(model, dataset, tmp_path, training):
    trainer = make_trainer(model, dataset, tmp_path)
    batch = data_collator([dataset[n] for n in (0, 2, 6)])
    model.train(training)
    shapes = []
    model.llm.lm_head.register_forward_hook(lambda *call: shapes.append((len(call[1][0]), call[2].dim())))
    loss = trainer.compute_loss(model, dict(batch))
    assert shapes == [((batch["labels"] != -100).sum(), 0)]  # a loss, not logits
    loss.backward()
    some = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(data={k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    full = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    full.backward()
    torch.testing.assert_close(loss, full, atol=1e-5, rtol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(some[name], parameter.grad, atol=1e-5, rtol=0, msg=name)


def test_loss_of_the_golden_batch(model, llm_type, dataset, tmp_path):
    from safetensors.torch import load_file

    trainer = make_trainer(model, dataset, tmp_path)
    loss = trainer.compute_loss(model, golden_batch(llm_type))  # a batch of somebody else's collator
    expected = load_file(GOLDEN[llm_type] / "expected.safetensors")["loss"][0]
    torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=0)


def test_accumulation_equals_a_large_batch(llm_type, dataset, tmp_path):
    """The same eight samples in one step, as batches of 8, 4 x 2 and 1 x 8: answers differ in length."""
    results = []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        model = AutoModel.from_pretrained(GOLDEN[llm_type], dtype=torch.float32)
        trainer = make_trainer(
            model,
            dataset,
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
        )
        trainer.train()
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((history, {name: p.detach().clone() for name, p in model.named_parameters()}))
    for history, weights in results[1:]:
        assert history == pytest.approx(results[0][0], abs=2e-4)  # the log rounds
        for name, weight in weights.items():
            torch.testing.assert_close(weight, results[0][1][name], atol=1e-6, rtol=1e-5, msg=name)


def test_the_vision_tower_has_a_learning_rate_of_its_own(dataset, llm_type, tmp_path):
    """On the schedule of all others; 0 leaves it as it is, and changes no step of the rest."""
    trained = {}
    for rate in (None, 0.0, 5e-4):
        model = AutoModel.from_pretrained(GOLDEN[llm_type], dtype=torch.float32)
        trainer = make_trainer(model, dataset, tmp_path, learning_rate=1e-3, max_steps=4, lr_scheduler_type="linear")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer.args.vision_learning_rate = rate
        trainer.create_optimizer()
        assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(before)
        rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            assert rates[id(parameter)] == (rate if rate is not None and name.startswith("vpm.") else 1e-3)
        assert trainer.optimizer.param_groups[0]["lr"] == 1e-3  # what is logged
        trainer.create_scheduler(4)
        trainer.lr_scheduler.step()
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.75 * r for r in rates.values()}
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.train()
        trained[rate] = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    moved = {rate: max(float(d.abs().max()) for n, d in trained[rate].items() if "vpm." in n) for rate in trained}
    assert moved[0.0] == 0.0 < 0.4 * moved[None] < moved[5e-4] < 0.6 * moved[None]
    assert all(float(d.abs().max()) > 0 for n, d in trained[0.0].items() if n.startswith("resampler.attn.in_proj_w"))


def test_loss_divides_by_the_tokens_of_the_whole_step():
    logits = torch.randn(5, 7)
    labels = torch.tensor([1, -100, 2, 3, -100])
    total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(token_loss(CausalLMOutputWithPast(logits=logits), labels, torch.tensor(12)), total / 12)
    torch.testing.assert_close(token_loss(CausalLMOutputWithPast(logits=logits), labels), total / 3)


def test_evaluation_keeps_no_logits_unless_asked(model, dataset, tmp_path):
    trainer = make_trainer(model, dataset, tmp_path, per_device_eval_batch_size=4)
    shapes = []
    model.llm.lm_head.register_forward_hook(lambda *call: shapes.append(call[2].dim()))
    metrics = trainer.evaluate()
    assert shapes == [0, 0]  # a loss, not logits
    loss, logits, labels = trainer.prediction_step(model, data_collator([dataset[0]]), prediction_loss_only=True)
    assert logits is None and labels is None and loss > 0
    batch = data_collator([dataset[0], dataset[6]])
    _, logits, labels = trainer.prediction_step(model, batch, prediction_loss_only=False)
    assert logits.shape == (*batch["input_ids"].shape, 704) and labels.shape == batch["labels"].shape
    assert metrics["eval_loss"] > 0


def test_evaluation_loss_is_the_mean_over_supervised_tokens_at_any_batch(model, dataset, tmp_path):
    """Answers differ in length, so that a mean of batches would be another number at each batch size."""
    total, count = 0.0, 0
    for item in dataset:
        batch = data_collator([item])
        with torch.no_grad():
            logits = model.eval()(data={k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        labels = batch["labels"].flatten()
        total += float(F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    for batch_size, drop_last in ((1, False), (3, False), (3, True), (8, False), (16, True)):
        arguments = {"per_device_eval_batch_size": batch_size, "dataloader_drop_last": drop_last}
        metrics = make_trainer(model, dataset, tmp_path, **arguments).evaluate()
        assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-6), (batch_size, drop_last)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fills_up_an_evaluation_counts_nothing(model, dataset, tmp_path, rank):
    """Of data sets that do not mask it themselves: three samples in batches of two, for two processes."""
    trainer = make_trainer(model, dataset, tmp_path, per_device_eval_batch_size=2)
    subset = torch.utils.data.Subset(dataset, [4, 3, 2])
    trainer.args = SimpleNamespace(world_size=2, process_index=rank, eval_batch_size=2)
    trainer._evaluated, trainer._fill_from = [], len(subset)
    order = list(WholeSteps(range(3), 4))[2 * rank : 2 * rank + 2]
    batch = data_collator([subset[index] for index in order])
    kept = trainer._without_fill(batch)["labels"]
    assert torch.equal(kept[: 2 - rank], batch["labels"][: 2 - rank])
    assert (kept[2 - rank :] == -100).all() and (batch["labels"][2 - rank :] != -100).any() == bool(rank)


def test_an_evaluation_of_a_subset_counts_each_sample_once(model, dataset, tmp_path):
    subset = torch.utils.data.Subset(dataset, [4, 3, 2])
    losses = []
    for batch_size, drop_last in ((1, False), (2, True), (8, True)):
        arguments = {"per_device_eval_batch_size": batch_size, "dataloader_drop_last": drop_last}
        trainer = make_trainer(model, dataset, tmp_path, **arguments)
        losses.append(trainer.evaluate(subset)["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_the_best_checkpoint_is_that_of_the_loss_over_tokens(tmp_path):
    """Learned by heart, the short answers' loss falls, and that of the one long answer rises: a mean over batches of
    one sample would call the last checkpoint the best."""

    class Drifting(nn.Module):
        """Answers of one token become likelier with each step, the long one unlikelier."""

        def __init__(self):
            super().__init__()
            self.drift = nn.Parameter(torch.tensor(6.0))

        def forward(self, data):
            certain = torch.zeros(*data["input_ids"].shape, 704)
            certain[..., 1] = self.drift
            return CausalLMOutputWithPast(logits=certain)

    def item(label: int, tokens: int) -> dict:
        ids = torch.arange(20)
        labels = torch.full((20,), -100)
        labels[:tokens] = label
        empty = {"pixel_values": [], "tgt_sizes": torch.zeros(0, 2), "image_bound": torch.zeros(0, 2)}
        return {"input_ids": ids, "position_ids": ids, "labels": labels, **empty}

    short, long = [item(1, 1)] * 4, [item(2, 16)]
    best = {}
    for batch_size in (1, 5):
        trainer = make_trainer(
            Drifting(),
            short,
            tmp_path / str(batch_size),
            learning_rate=0.5,
            max_steps=4,
            per_device_eval_batch_size=batch_size,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            metric_for_best_model="loss",
            greater_is_better=False,
        )
        trainer.eval_dataset = short + long
        trainer.train()
        history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert history == sorted(history) and history[0] < history[-1]
        best[batch_size] = trainer.state.best_global_step
    assert best == {1: 1, 5: 1}


class Bigram(nn.Module):
    """Any module with `forward(data=...) -> .logits`."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(704, 704)
        self.seen = []

    def forward(self, data):
        self.seen.append(sorted(data))
        return CausalLMOutputWithPast(logits=self.table(data["input_ids"]))


def test_any_module_with_the_contract_trains_through_its_wrapper(dataset, tmp_path):
    model = Bigram()
    trainer = make_trainer(model, dataset, tmp_path, max_steps=3, per_device_train_batch_size=2, learning_rate=1.0)
    calls = []
    wrapped = trainer._wrap_model

    class Wrapper(nn.Module):  # stands for DDP and DeepSpeed's engine
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            calls.append(1)
            return self.module(*args, **kwargs)

    trainer._wrap_model = lambda module, *args, **kwargs: Wrapper(wrapped(module, *args, **kwargs))
    before = model.table.weight.detach().clone()
    trainer.train()
    assert len(calls) == 3
    assert not torch.equal(before, model.table.weight)
    assert {"input_ids", "position_ids", "pixel_values", "image_bound", "tgt_sizes"} <= set(model.seen[0])
    assert "labels" not in model.seen[0]


def test_group_by_length(model, dataset, tmp_path, monkeypatch):
    """Batches come from the data set's own lengths, anew in every epoch, and evaluation keeps its order."""
    dataset.lengths = [len(dataset[n]["input_ids"]) for n in range(len(dataset))]
    trainer = make_trainer(
        model, dataset, tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=2
    )
    monkeypatch.setattr(SupervisedDataset, "__getitem__", lambda _, index: {"index": index})
    trainer.data_collator = lambda items: [item["index"] for item in items]
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append(list(loader))
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(chain.from_iterable(epochs[0])) == list(range(len(dataset)))
    assert max(dataset.lengths) == dataset.lengths[epochs[0][0][0]]
    assert list(chain.from_iterable(trainer.get_eval_dataloader())) == list(range(len(dataset)))


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
@pytest.mark.parametrize("samples", [5, 6, 7, 8])
@pytest.mark.parametrize("further", [{}, {"gradient_accumulation_steps": 2}, {"dataloader_drop_last": True}], ids=str)
def test_two_processes_take_the_steps_of_one(model, dataset, tmp_path, monkeypatch, strategy, samples, further):
    """Each epoch, and one that a resumed run begins within; nothing is learned twice where samples are left over."""
    dataset.lengths = [len(dataset[n]["input_ids"]) for n in range(samples)]
    dataset.raw_data = dataset.raw_data[:samples]
    dataset.loads = np.array([[10 * (number % 3), number % 2] for number in range(samples)])
    dealt, accumulation = [], further.get("gradient_accumulation_steps", 1)
    monkeypatch.setattr(BalancedSteps, "_dealt", lambda self, step: dealt.append(step) or _DEALT(self, step))
    monkeypatch.setattr(SupervisedDataset, "__getitem__", lambda _, index: {"index": index})

    def loader_of(processes: int, process: int):
        size = 4 // processes // accumulation
        flags = {"train_sampling_strategy": strategy, "per_device_train_batch_size": size, **further}
        trainer = make_trainer(model, dataset, tmp_path, **flags)
        trainer.data_collator = lambda items: [item["index"] for item in items]
        monkeypatch.setattr(TrainingArguments, "world_size", processes)
        monkeypatch.setattr(trainer.accelerator, "prepare", partial(_prepared, processes=processes, process=process))
        return trainer.get_train_dataloader()

    def steps_of(loader) -> list[list[int]]:
        batches = list(loader)
        return [
            list(chain.from_iterable(batches[start : start + accumulation]))
            for start in range(0, len(batches), accumulation)
        ]

    one, *two = loader_of(1, 0), loader_of(2, 0), loader_of(2, 1)
    for epoch in (1, 0, 1):
        steps = []
        for loader in (one, *two):
            loader.set_epoch(epoch)
            steps.append(steps_of(loader))
        together = [left + right for left, right in zip(*steps[1:], strict=True)]
        learned = [sorted(index for index in step if not isinstance(index, Repeated)) for step in together]
        if strategy != "group_by_length" or samples == 8:  # megabatches are as long as a step of all processes
            assert learned == [sorted(step) for step in steps[0]]
        if not further.get("dataloader_drop_last"):
            assert sorted(chain.from_iterable(learned)) == list(range(samples))
        for loader, whole in zip((one, *two), steps, strict=True):
            resumed = skip_first_batches(loader, accumulation)
            resumed.set_epoch(epoch)
            assert steps_of(resumed) == whole[1:]
    assert dealt


_DEALT = BalancedSteps._dealt


def _prepared(loader, processes: int, process: int):
    settings = {"put_on_device": False, "use_seedable_sampler": True, "rng_types": []}
    return prepare_data_loader(loader, num_processes=processes, process_index=process, **settings)


def test_processes_get_as_much_to_do():
    """Slices of the pictures of a benchmark, in turn: two processes would get 19 and 8 of a step."""
    costs = np.array([10, 9, 5, 3] * 4)
    steps = BalancedSteps(range(16), costs, batch_size=2, processes=2, accumulation=1)
    dealt = list(steps)
    assert len(steps) == len(dealt)
    for start in range(0, 16, 4):
        assert sorted(dealt[start : start + 4]) == list(range(start, start + 4))
        assert sorted(costs[dealt[start : start + 4]].reshape(2, 2).sum(axis=1)) == [13, 14]
    # One sample at a time, twice in a step: what processes compute at the same time costs about the same.
    costs = np.array([1, 9, 2, 8])
    dealt = costs[list(BalancedSteps(range(4), costs, batch_size=1, processes=2, accumulation=2))]
    assert dealt.tolist() == [9, 8, 1, 2]  # and over the whole step, where they wait for each other only at its end


@settings(max_examples=200, deadline=None)
@given(
    costs=st.lists(st.integers(0, 50), min_size=1, max_size=60),
    sizes=st.tuples(st.integers(1, 4), st.integers(2, 4), st.integers(1, 3)),
)
def test_dealing_keeps_a_steps_samples_and_is_never_slower(costs, sizes):
    batch_size, processes, accumulation = sizes
    at_once = batch_size * processes
    drawn = list(WholeSteps(range(len(costs)), at_once))
    steps = BalancedSteps(drawn, np.array(costs), *sizes)
    dealt = list(steps)
    for start in range(0, len(drawn), at_once * accumulation):
        before, after = (order[start : start + at_once * accumulation] for order in (drawn, dealt))
        assert sorted(map(id, before)) == sorted(map(id, after))  # the same objects, `Repeated` among them
        assert steps._time(after) <= steps._time(before)


@pytest.mark.parametrize(
    ("name", "tokens", "vision", "language"),
    [("minicpm_llama3_v2_5", 96, 0.418e9, 6.98e9), ("minicpm_v2", 64, 0.397e9, 2.45e9)],
)
def test_a_slice_costs_its_tokens_and_its_way_through_the_vision_tower(name, tokens, vision, language):
    """1024 patches of it, with the real models' numbers of weights."""
    config = AutoConfig.from_pretrained(ROOT / "tests" / "hub" / f"{name}_config.json")
    with torch.device("meta"):
        model = MiniCPMV(config)
    assert slice_cost(model) == pytest.approx(tokens + 1024 * vision / language, rel=0.02)


def test_a_repeated_sample_teaches_nothing(dataset):
    plain, repeated = dataset[1], dataset[Repeated(1)]
    assert (plain["labels"] != -100).any() and (repeated["labels"] == -100).all()
    assert torch.equal(plain["input_ids"], repeated["input_ids"])


def test_biases_of_keys_do_not_move(model, llm_type, dataset, tmp_path):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer(model, dataset, tmp_path, max_steps=2, optim="adamw_torch", learning_rate=1e-2).train()
    width = model.resampler.attn.in_proj_bias.numel() // 3
    moved = {name: (p.detach() - before[name]).abs() for name, p in model.named_parameters()}
    bias = moved["resampler.attn.in_proj_bias"]
    assert bias[width : 2 * width].max() == 0 < bias[:width].max() and bias[2 * width :].max() > 0
    keys = [n for n in moved if n.startswith("vpm.") and n.endswith(("k_proj.bias", "qkv.bias"))]
    assert keys
    for name in keys:
        third = moved[name].numel() // 3
        assert moved[name][third : 2 * third].max() == 0
        assert (moved[name].max() == 0) == (llm_type == "llama3")
