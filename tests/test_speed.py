"""What makes steps fast changes nothing in their result: checkpointing, ZeRO's step, settings of one process."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import GOLDEN, LLM_TYPES, golden_batch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import AutoModel

from finetune.arguments import TrainingArguments
from finetune.dataset import data_collator
from finetune.finetune import use_liger_kernels
from finetune.recompute import recompute
from finetune.trainer import CPMTrainer
from finetune.zero import leave_out_reduction, split_param_groups, use_one_norm, without_communication


def test_recompute_gives_the_same_with_dropout_and_keeps_nothing():
    layer = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.GELU(), nn.Linear(32, 6))
    layer[0].bias.requires_grad_(False)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    counts = []
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda _: counts.append(1))

    def run(how, random_seed: int = 3) -> tuple:
        layer.zero_grad()
        x = torch.arange(30.0).view(5, 6).div(30).requires_grad_()
        saved = []
        torch.manual_seed(random_seed)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
            y = how(lambda x, scale: layer(x) * scale, x * 2, 3.0)
        behind = torch.rand(1)  # dropout elsewhere is not disturbed
        (y.square().sum() * torch.rand(1)).backward()
        return y.detach(), x.grad, [p.grad.clone() for p in trained], behind, torch.rand(1), saved

    plain = run(lambda function, *inputs: function(*inputs))
    counts.clear()
    light = run(partial(recompute, trained, True))
    assert len(counts) == len(trained)  # as DDP and DeepSpeed see them
    for one, other in zip(plain[:5], light[:5], strict=True):
        torch.testing.assert_close(one, other)
    assert layer[0].bias.grad is None
    assert len(plain[5]) > len(light[5]) == 1 + len(trained)  # the input and the parameters
    careless = run(partial(recompute, trained, False))
    assert not torch.allclose(careless[2][0], plain[2][0])  # says that the dropout above was the same for a reason


def test_recompute_of_frozen_layers_and_inputs_without_gradients():
    layer = nn.Linear(4, 4).requires_grad_(False)
    assert not recompute([], False, layer, torch.ones(2, 4)).requires_grad
    x = torch.ones(2, 4, requires_grad=True)
    recompute([], False, layer, x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 4))
    layer.requires_grad_(True)
    recompute(list(layer.parameters()), False, layer, torch.ones(2, 4)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 2.0))


def test_recompute_takes_what_is_no_tensor_and_what_is_trained_by_now():
    layer = nn.Linear(4, 4).requires_grad_(False)
    x = torch.ones(2, 4, requires_grad=True)
    parameters = list(layer.parameters())
    layer.weight.requires_grad_(True)
    recompute(parameters, False, lambda nothing, x, scale: layer(x) * scale, None, x, 2.0).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((4, 4), 4.0))
    assert layer.bias.grad is None and x.grad is not None


def test_recompute_under_autocast():
    layer = nn.Linear(8, 8)
    x = torch.randn(3, 8, requires_grad=True)
    grads = []
    for how in (layer, partial(recompute, list(layer.parameters()), False, layer)):
        with torch.autocast("cpu", torch.bfloat16):
            y = how(x)
        assert y.dtype == torch.bfloat16
        grads.append(torch.autograd.grad(y.float().sum(), (x, layer.weight)))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


class Elsewhere(torch.Tensor):
    """A tensor of a device that is neither the CPU nor CUDA and draws its own random numbers: "lazy", which autograd
    knows and no machine has. Computed on the CPU, with the generator that stands for the device's."""

    generator = torch.Generator()

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device="lazy:0")

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, cls) else x, (args, dict(kwargs or {})))
        if kwargs.get("device") == torch.device("lazy:0"):
            kwargs["device"] = torch.device("cpu")
        of_cpu = torch.get_rng_state()
        torch.set_rng_state(cls.generator.get_state())
        made = function(*args, **kwargs)
        cls.generator.set_state(torch.get_rng_state())
        torch.set_rng_state(of_cpu)
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, made)


def test_recompute_draws_the_same_mask_on_any_kind_of_device(monkeypatch):
    module = SimpleNamespace(
        get_rng_state=Elsewhere.generator.get_state,
        set_rng_state=Elsewhere.generator.set_state,
        device=lambda _: nullcontext(),
    )
    monkeypatch.setattr(torch, "lazy", module, raising=False)
    x = Elsewhere(torch.ones(256)).requires_grad_()
    first = recompute([], True, nn.Dropout(0.5), x)
    second = recompute([], True, nn.Dropout(0.5), x)
    assert not torch.equal(first.inner, second.inner)
    before = Elsewhere.generator.get_state()
    (grad,) = torch.autograd.grad((first + 3 * second).sum(), x)
    torch.testing.assert_close(grad.inner, first.inner + 3 * second.inner, atol=0, rtol=0)
    assert torch.equal(Elsewhere.generator.get_state(), before)  # what comes after draws as if nothing was replayed


@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_checkpointing_with_attention_dropout_and_noise_on_embeddings(llm_type, tmp_path):
    """Dropout without a module of its own, in the padded computation, is drawn again as it was; NEFTune runs."""
    weights = []
    for checkpointing in (False, True):
        model = AutoModel.from_pretrained(GOLDEN[llm_type], dtype=torch.float32, attention_dropout=0.3)
        assert model.llm.config.attention_dropout == 0.3
        arguments = {"gradient_checkpointing": checkpointing, "neftune_noise_alpha": 5.0}
        train_one_step(model, golden_batch(llm_type), tmp_path, **arguments)
        weights.append({name: p.detach() for name, p in model.named_parameters()})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_noise_of_neftune_is_that_of_each_sample_alone(llm_type, attention, tmp_path):
    """alpha / sqrt(tokens * width) at most, whatever else is in the batch: without padding, or with it."""
    model = AutoModel.from_pretrained(GOLDEN[llm_type], dtype=torch.float32, attn_implementation=attention)
    items = []
    for length in (10, 40, 90, 160):
        ids = torch.arange(20, 20 + length)
        empty = {"pixel_values": [], "tgt_sizes": torch.zeros(0, 2), "image_bound": torch.zeros(0, 2)}
        items.append({"input_ids": ids, "position_ids": torch.arange(length), "labels": ids, **empty})
    seen = []
    model.llm.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    settings = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "dataloader_num_workers": 0}
    settings |= {"output_dir": str(tmp_path), "max_steps": 1, "learning_rate": 0.0, "neftune_noise_alpha": 5.0}
    arguments = TrainingArguments(per_device_train_batch_size=4, train_sampling_strategy="sequential", **settings)
    CPMTrainer(model=model, args=arguments, train_dataset=items, data_collator=data_collator).train()
    width, scale = model.config.hidden_size, model.scale_emb
    rows = seen[0][0].split([len(item["input_ids"]) for item in items]) if attention == "sdpa" else seen[0]
    for item, row in zip(items, rows, strict=True):
        ids = item["input_ids"]
        noise = row[: len(ids)] / scale - model.get_input_embeddings()(ids).detach()
        most = 5.0 / (len(ids) * width) ** 0.5
        assert 0.97 * most < float(noise.abs().max()) < 1.001 * most
        assert float(noise.std()) == pytest.approx(most / 3**0.5, rel=0.05)  # of a uniform distribution


def train_one_step(model, data: dict, tmp_path, **arguments) -> None:
    """On the first sample of `data`, with SGD."""
    settings = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "dataloader_num_workers": 0}
    settings |= {"output_dir": str(tmp_path), "max_steps": 1, "optim": "sgd", "learning_rate": 0.1, **arguments}
    items = [{name: value[0] for name, value in data.items()}]
    transformers.set_seed(0)
    CPMTrainer(
        model=model, args=TrainingArguments(**settings), train_dataset=items, data_collator=data_collator
    ).train()


@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_own_settings_of_checkpointing_are_torchs(llm_type, tmp_path, monkeypatch):
    """`--gradient_checkpointing_kwargs` speaks of torch's checkpointing, which then runs."""
    monkeypatch.setattr("finetune.trainer.recompute", lambda *_: pytest.fail("not torch's"))
    model = AutoModel.from_pretrained(GOLDEN[llm_type], dtype=torch.float32)
    own = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    train_one_step(model, golden_batch(llm_type), tmp_path, **own)


@pytest.mark.parametrize("llm_type", LLM_TYPES)
@pytest.mark.parametrize(
    ("flags", "vision", "language"),
    [
        ({}, 1, 1),
        ({"gradient_checkpointing": True}, 2, 2),
        ({"gradient_checkpointing": True, "vision_checkpointing": False}, 1, 2),
        ({"llm_checkpointing": False, "vision_checkpointing": True}, 2, 1),
    ],
)
def test_checkpointing_of_vision_and_language_apart(llm_type, flags, vision, language, tmp_path):
    """How often each layer runs in a step; the step's weights are the same."""
    weights = []
    for arguments in ({}, flags):
        model = AutoModel.from_pretrained(GOLDEN[llm_type], dtype=torch.float32)
        runs = {model.resampler.ln_kv: 0, model.vpm.layers[1].mlp: 0, model.llm.model.layers[1].mlp: 0}
        for module in runs:
            module.register_forward_hook(lambda m, *_, runs=runs: runs.__setitem__(m, runs[m] + 1))
        train_one_step(model, golden_batch(llm_type), tmp_path, **arguments)
        weights.append({name: p.detach() for name, p in model.named_parameters()})
    assert list(runs.values()) == [vision, vision, language]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-6, rtol=1e-5, msg=name)


def test_param_groups_of_limited_size():
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 4, 10, 1, 1, 5)]
    optimizer = torch.optim.AdamW([{"params": parameters[:4]}, {"params": parameters[4:], "weight_decay": 0.5}], lr=1)
    split_param_groups(optimizer, most=7)
    sizes = [[p.numel() for p in group["params"]] for group in optimizer.param_groups]
    assert sizes == [[3, 4], [10], [1], [1, 5]]
    assert [p for group in optimizer.param_groups for p in group["params"]] == parameters
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01] * 3 + [0.5]


class ZeroOptimizer:
    """What `use_one_norm` and `leave_out_reduction` touch of DeepSpeed's."""

    compute_grad_norm = check_grad_overflow = True

    def __init__(self):
        self.called = []

    def get_grad_norm_direct(self, gradients, params, norm_type=2):
        self.called.append((len(gradients), len(params)))
        norms = [torch.linalg.vector_norm(gradient.double(), ord=norm_type) for gradient in gradients]
        return torch.linalg.vector_norm(torch.stack(norms), ord=norm_type) if norms else torch.tensor(0.0)

    def check_overflow(self, **_):
        self.called.append("overflow")

    def buffered_reduce_fallback(self, *_, **__):
        self.called.append("reduction")


def test_one_norm_of_all_gradients():
    torch.manual_seed(0)
    gradients = [torch.randn(n).bfloat16() for n in (1000, 7, 300)]
    padding = torch.full((5,), 1e6)
    padding._zero_padding = True
    parameters = [nn.Parameter(g.clone()) for g in gradients]
    expected = ZeroOptimizer().get_grad_norm_direct(gradients, parameters)
    light = ZeroOptimizer()
    use_one_norm(light)
    norm = light.get_grad_norm_direct([*gradients, padding], parameters)
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    assert light.called == [(1, 1)]  # DeepSpeed's function adds up over ranks, once
    light.get_grad_norm_direct([padding], [])  # a rank whose share is padding takes part in that too
    assert light.called[1:] == [(0, 0)]
    light.check_overflow()
    assert len(light.called) == 2
    for bad in (float("nan"), float("inf")):  # what tells DeepSpeed to leave out the step
        gradients[1][3] = bad
        assert not torch.isfinite(light.get_grad_norm_direct(gradients, parameters))
    unclipped = ZeroOptimizer()
    unclipped.compute_grad_norm = False
    use_one_norm(unclipped)
    unclipped.check_overflow()
    assert unclipped.called == ["overflow"]
    leave_out_reduction(light)
    light.buffered_reduce_fallback(None, gradients, torch.bfloat16)
    assert "reduction" not in light.called


def test_one_process_needs_no_communication(tmp_path, monkeypatch):
    zero = {"stage": 2, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 7}
    for stage in (1, 2):
        light = without_communication({"x": 1, "zero_optimization": {**zero, "stage": stage}})
        expected = {**zero, "stage": stage, "overlap_comm": False, "contiguous_gradients": False}
        assert light == {"x": 1, "zero_optimization": expected}
    offloaded = {**zero, "offload_optimizer": {"device": "cpu"}}
    for other in ({**zero, "stage": 3}, {**zero, "stage": 0}, offloaded):
        assert without_communication({"zero_optimization": other}) == {"zero_optimization": other}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero, "train_micro_batch_size_per_gpu": "auto"}))
    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", lambda _: None)  # which starts DeepSpeed
    monkeypatch.setenv("WORLD_SIZE", "1")
    arguments = TrainingArguments(output_dir=str(tmp_path), deepspeed=str(path))
    assert arguments.deepspeed["zero_optimization"]["overlap_comm"] is False
    assert without_communication({"zero_optimization": {"stage": 2, "offload_optimizer": None}}) != {}
    arguments = TrainingArguments(output_dir=str(tmp_path), deepspeed={"zero_optimization": zero})
    assert arguments.deepspeed["zero_optimization"]["contiguous_gradients"] is False
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda has_gpu=has_gpu: has_gpu)
        monkeypatch.setattr("finetune.arguments.found_precision", lambda _: (False, False))
        arguments = TrainingArguments(output_dir=str(tmp_path))
        assert arguments.accelerator_config == ({"non_blocking": True} if has_gpu else None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert TrainingArguments(output_dir=str(tmp_path), deepspeed=str(path)).deepspeed == json.loads(path.read_text())
    arguments = TrainingArguments(output_dir=str(tmp_path), accelerator_config={"split_batches": True})
    assert arguments.accelerator_config == {"split_batches": True}


@pytest.mark.parametrize(
    ("flags", "vision", "language", "whole"),
    [
        ({}, False, False, False),
        ({"gradient_checkpointing": True}, True, True, True),
        ({"gradient_checkpointing": True, "llm_checkpointing": False}, True, False, True),
        ({"vision_checkpointing": True}, True, False, True),
        ({"gradient_checkpointing": True, "llm_checkpointing": False, "vision_checkpointing": False}, *[False] * 3),
    ],
)
def test_checkpointing_flags(flags, vision, language, whole, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), **flags)
    assert (arguments.vision_checkpointing, arguments.llm_checkpointing) == (vision, language)
    newest = "activation_checkpointing" if hasattr(arguments, "activation_checkpointing") else "gradient_checkpointing"
    assert bool(getattr(arguments, newest)) is whole


@pytest.mark.gpu
@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_liger_kernels_give_the_same(llm_type):
    """Needs liger-kernel."""
    pytest.importorskip("liger_kernel")
    data = golden_batch(llm_type)
    data = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in data.items()}
    model = AutoModel.from_pretrained(GOLDEN[llm_type], dtype=torch.float32).cuda()
    logits = model(data=data).logits
    use_liger_kernels(model.llm)
    mlp = model.llm.model.layers[0].mlp
    assert "liger" in f"{mlp.forward.__module__} {type(mlp).__module__}"
    torch.testing.assert_close(model(data=data).logits, logits, atol=1e-4, rtol=0)
