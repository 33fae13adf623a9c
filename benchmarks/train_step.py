"""Speed and memory of training steps, through finetune.py's own path, on a model of real size with random weights.

    python benchmarks/train_step.py --model 2.5 --method lora --batch 2 --deepspeed finetune/ds_config_zero2.json
    python finetune/launch.py --standalone --nproc_per_node 2 benchmarks/train_step.py --model 2.5 --method full \\
        --deepspeed finetune/ds_config_zero3.json

No checkpoint is needed: the configuration is the real one, the tokenizer a small one made on the spot, and the weights
are made on the device. Flags that this file does not know go to finetune.py and win over the settings in `RECIPE`.
Photo-like JPEGs of `--pictures` come in turn, one per sample, with two questions and answers.

What the numbers mean: samples and tokens per second and FLOPs per step are of all processes together, FLOP/s and its
fraction of the measured matrix multiplication rate are per device, memory is that of the process with most. Tokens are
those of the samples, without padding. FLOPs are those of matrix multiplications on samples without padding: "model"
counts forward and backward, "done" also what gradient checkpointing computes a second time. Data wait is the time that
the training process stands still for its data loader; batch wait adds the copy to the device, which waits for the work
queued before it. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import math
import os
import platform
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import mean, median
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import transformers
from data_pipeline import ANSWER, photo
from torch.utils.data.dataloader import _BaseDataLoaderIter
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers import initialization as init
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

import finetune.finetune as toolkit
from finetune.errors import UserError, over_processes
from finetune.minicpmv import MiniCPMV, MiniCPMVConfig
from finetune.minicpmv.resampler import Resampler
from finetune.minicpmv.tiny import MODELS, write_checkpoint
from finetune.trainer import CPMTrainer

ROOT = Path(__file__).resolve().parent.parent
ON_GPU = torch.cuda.is_available()
HUB_CONFIGS = {"2.5": "minicpm_llama3_v2_5_config.json", "2.0": "minicpm_v2_config.json"}
PICTURES = "1344x1344,1920x1080,1024x768,640x480"
RECIPE = f"""
    --gradient_checkpointing true --model_max_length 2048 --max_slice_nums 9 --learning_rate 1e-6
    --lr_scheduler_type constant --weight_decay 0.1 --adam_beta2 0.95 --seed 0 --logging_steps 1000000
    --save_strategy no --report_to none --disable_tqdm true --train_sampling_strategy sequential
    --dataloader_num_workers {8 if ON_GPU else 0}
""".split()
TARGETS = r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj)"  # the original's
METHODS = {
    "lora": f"--use_lora true --lora_r 64 --lora_alpha 64 --lora_dropout 0.05 --lora_target_modules {TARGETS}".split(),
    "full": ["--tune_llm", "true"],
}
OWN_FLAGS = ("--max_steps", "--data_path", "--output_dir", "--model_name_or_path")
PROFILED_STEPS = 3
STD = 0.02  # of random weights
GIB = 2**30


@dataclass
class Counts:
    """What samples bring: `lengths`, tokens of each; `supervised` tokens; `patches` of each slice."""

    lengths: list[int]
    supervised: int
    patches: list[int]

    @classmethod
    def of(cls, item: Mapping) -> Counts:
        """Of an item of `SupervisedDataset`."""
        patches = [high * wide for high, wide in torch.as_tensor(item["tgt_sizes"]).view(-1, 2).tolist()]
        return cls([len(item["input_ids"])], int((item["labels"] != -100).sum()), patches)

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.lengths + other.lengths, self.supervised + other.supervised, self.patches + other.patches)


def step_flops(
    config: MiniCPMVConfig,
    counts: Counts,
    trained: Collection[str],
    vision_checkpointing: bool,
    llm_checkpointing: bool,
    lora_parameters: int = 0,
) -> tuple[float, float]:
    """FLOPs of the matrix multiplications of a training step, (done, model): with and without recomputation.

    Gradients of the loss with respect to inputs are counted wherever something that is trained lies before, those with
    respect to weights where these are trained. Gradients pass through the language model in any case.

    Args:
        config: of the model.
        counts: of all samples of the step.
        trained: which of `vpm`, `resampler` and `llm` (the layers' own weights and lm_head) are trained.
        vision_checkpointing, llm_checkpointing: whether blocks are computed again in the backward pass.
        lora_parameters: elements of all LoRA matrices of the language model, which are trained.
    """
    with torch.device("meta"):
        model = MiniCPMV(copy.deepcopy(config))

    def weights(module: torch.nn.Module, dimensions: int = 2) -> int:
        return sum(p.numel() for p in module.parameters() if p.ndim == dimensions)

    vpm, llm, resampler = model.vpm, model.llm, model.resampler
    blocks = vpm.blocks if hasattr(vpm, "blocks") else vpm.encoder.layers
    queries, width = resampler.query.shape
    tokens, patches, slices = sum(counts.lengths), sum(counts.patches), len(counts.patches)
    vision, resampling, language = ("vpm" in trained), ("resampler" in trained), ("llm" in trained)
    through = vision or resampling
    again = vision and vision_checkpointing
    parts = (  # FLOPs of the forward pass, how often the backward pass repeats them, whether they are recomputed
        (2 * weights(vpm, 4) * patches, vision, False),  # patch embedding
        (2 * weights(blocks) * patches, 2 * vision, again),
        (4 * vpm.width * sum(n * n for n in counts.patches) * len(blocks), 2 * vision, again),
        # resampler: kv_proj, keys and values of patches; queries once; out_proj and proj of each slice; attention
        (2 * (weights(resampler.kv_proj) + 2 * width**2) * patches, vision + resampling, False),
        (2 * width**2 * queries * (slices > 0), 2 * resampling, False),
        (4 * width**2 * queries * slices, through + resampling, False),
        (4 * width * queries * patches, 2 * through, False),
        # language model; causal attention sees half of the positions
        (2 * weights(llm.model.layers) * tokens, 1 + language, llm_checkpointing),
        (2 * width * sum(n * n for n in counts.lengths) * len(llm.model.layers), 2, llm_checkpointing),
        (2 * lora_parameters * tokens, 2, llm_checkpointing),
        (2 * weights(llm.lm_head) * counts.supervised, 1 + language, False),
    )
    without = sum(forward * (1 + backward) for forward, backward, _ in parts)
    return float(without + sum(forward * recomputed for forward, _, recomputed in parts)), float(without)


def random_model(_path: str, *, config: MiniCPMVConfig, dtype: torch.dtype, attn_implementation: str, **_) -> MiniCPMV:
    """In place of `MiniCPMV.from_pretrained`: random weights, made where they are used; partitioned under ZeRO-3."""
    device = torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")
    place = contextlib.nullcontext() if is_deepspeed_zero3_enabled() else device
    initialize = mock.patch("transformers.integrations.deepspeed.initialize_weights_zero3")
    with init.no_init_weights(), initialize, place:
        model = MiniCPMV._from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attn_implementation)
    fill(model, device)
    return model


@torch.no_grad()
def fill(model: MiniCPMV, device: torch.device) -> None:
    """Random matrices, ones as the weights of norms, zeros as biases, and the resampler's own position table."""
    block = None  # for shares of parameters in host memory, which is slow at random numbers
    for name, parameter in model.named_parameters():
        data = getattr(parameter, "ds_tensor", parameter)
        if name.endswith("bias"):
            data.zero_()
        elif len(getattr(parameter, "ds_shape", parameter.shape)) == 1:
            data.fill_(1)
        elif data.device.type == device.type:
            data.normal_(0, STD)
        else:
            if block is None:
                block = torch.empty(2**26, device=device, dtype=data.dtype).normal_(0, STD).to(data.device)
            for part in data.view(-1).split(len(block)):
                part.copy_(block[: len(part)])
    table = model.resampler.pos_embed
    if table is not None:
        fresh = Resampler(*table.shape, kv_dim=table.shape[1], query_positions=True)
        fresh.init_parameters()
        table.copy_(fresh.pos_embed)


def write_model(name: str, folder: Path) -> Path:
    """Folder with configuration and tokenizer of `--model`; weights only where they are tiny."""
    if name.removeprefix("tiny-") not in HUB_CONFIGS:
        return Path(name)
    path = write_checkpoint(MODELS[0 if name.endswith("2.5") else 1], folder / "model")
    if name in HUB_CONFIGS:
        (path / "model.safetensors").unlink()
        config = json.loads((ROOT / "tests" / "hub" / HUB_CONFIGS[name]).read_text(encoding="utf-8"))
        tiny = json.loads((path / "config.json").read_text(encoding="utf-8"))
        del config["auto_map"]
        config.update({key: tiny[key] for key in ("bos_token_id", "eos_token_id")})
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def write_data(pictures: Sequence[str], order: Sequence[int], answer_tokens: int, tokenizer, folder: Path) -> Path:
    """Samples of two turns, one for each of `order`, which counts in `pictures`; an answer has about `answer_tokens`
    tokens, or as many as a picture `text:N` says."""
    samples = []
    for picture in pictures:
        words, answer = cycle(ANSWER.split()), next(iter(ANSWER.split()))
        size, _, own_tokens = picture.partition(":")
        while len(tokenizer.tokenize(answer)) < int(own_tokens or answer_tokens):
            answer += " " + " ".join(next(words) for _ in range(8))
        sample = {
            "conversations": [
                {"role": "user", "content": "How many desserts are on the white plate?"},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": "What type of desserts are they?"},
                {"role": "assistant", "content": answer},
            ]
        }
        if size != "text":
            sample["image"] = f"{size}.jpg"
            wide, high = map(int, size.split("x"))
            photo((wide, high)).save(folder / sample["image"], quality=90)
        samples.append(sample)
    path = folder / "train.json"
    data = [{"id": str(number), **samples[entry]} for number, entry in enumerate(order)]
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def order_of_entries(options: argparse.Namespace, steps: int, samples_per_step: int) -> list[int]:
    """Which of `options.pictures` each sample of a run has: in turn, or with `--turn` for so many measured steps."""
    entries = len(options.pictures)
    if not options.turn:
        return [sample % entries for sample in range(steps * samples_per_step)]
    warmup = [step % entries for step in range(options.warmup)]
    measured = [step // options.turn % entries for step in range(steps - options.warmup)]
    return [entry for entry in warmup + measured for _ in range(samples_per_step)]


class Meter(TrainerCallback):
    """Takes the times of steps without waiting for the device, and all else that is known only within the run.

    `marks`, `host` hold device and host times of the run's start and of the end of every step; `data_wait`,
    `batch_wait`, host seconds of each step; `losses`, the loss tensors of each step's micro-batches.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.last = options.warmup + options.steps
        self.marks, self.host, self.losses = [], [], []
        self.waits, self.data_wait, self.batch_wait = [0.0, 0.0], [], []
        self.peak_allocated = self.peak_reserved = 0
        self.profiler, self.profile_start = None, 0.0

    def prepare(self, trainer: CPMTrainer) -> None:
        """Everything about model and samples, before DeepSpeed takes the model."""
        self.args, dataset = trainer.args, trainer.train_dataset
        self.config = getattr(trainer.model, "get_base_model", lambda: trainer.model)().config
        self.samples_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        self.samples_per_step *= self.args.world_size
        self.order = order_of_entries(self.options, self.args.max_steps, self.samples_per_step)
        self.counts = {entry: Counts.of(dataset[self.order.index(entry)]) for entry in sorted(set(self.order))}
        self.trained, self.lora_parameters = set(), 0
        self.parameters = {"trained": 0, "frozen": 0}
        for name, parameter in trainer.model.named_parameters():
            size = getattr(parameter, "ds_numel", parameter.numel())
            self.parameters["trained" if parameter.requires_grad else "frozen"] += size
            if ".lora_" in name:
                self.lora_parameters += size
            elif parameter.requires_grad and ".embed_tokens." not in name:
                self.trained.add(name.removeprefix("base_model.model.").split(".")[0])

    def step_counts(self, step: int) -> Counts:
        """Of the samples of all processes in step number `step`, from 0."""
        entries = self.order[step * self.samples_per_step : (step + 1) * self.samples_per_step]
        return sum((self.counts[entry] for entry in entries), Counts([], 0, []))

    def by_entry(self) -> list[dict]:
        """With `--turn`: median seconds of the steps of each of `--pictures`, without its first, and what they held."""
        rows = []
        for entry, picture in enumerate(self.options.pictures if self.options.turn else ()):
            first = self.options.warmup + entry * self.options.turn
            seconds = median(self.seconds(step, step + 1) for step in range(first + 1, first + self.options.turn))
            counts = self.step_counts(first)
            held = {"tokens": sum(counts.lengths), "slices": len(counts.patches), "patches": sum(counts.patches)}
            rows.append({"picture": picture, "seconds": seconds, **held})
        return rows

    def _mark(self) -> None:
        self.host.append(time.perf_counter())
        if ON_GPU:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(self.host[-1])
        if len(self.marks) == self.options.warmup + 1 and ON_GPU:
            torch.cuda.reset_peak_memory_stats()

    def seconds(self, start: int, end: int) -> float:
        """On the device, between two marks, after it was waited for."""
        first, second = self.marks[start], self.marks[end]
        return first.elapsed_time(second) / 1e3 if ON_GPU else second - first

    def on_train_begin(self, _args, _state, _control, **_):
        self.waits = [0.0, 0.0]  # the check of the samples has data loaders of its own
        self._mark()

    def on_step_end(self, _args, state, _control, **_):
        self._mark()
        self.data_wait.append(self.waits[0])
        self.batch_wait.append(self.waits[1])
        self.waits = [0.0, 0.0]
        if state.global_step == self.last and ON_GPU:
            self.peak_allocated = torch.cuda.max_memory_allocated()
            self.peak_reserved = torch.cuda.max_memory_reserved()
        if self.options.profile and state.is_world_process_zero:
            if state.global_step == self.last:
                self._start_profile()
            elif state.global_step == self.last + PROFILED_STEPS:
                self._write_profile()

    def _start_profile(self) -> None:
        activities = torch.profiler.ProfilerActivity
        wait_for_device()
        self.profiler = torch.profiler.profile(activities=[activities.CPU, *[activities.CUDA] * ON_GPU])
        self.profiler.start()
        self.profile_start = time.perf_counter()

    def _write_profile(self) -> None:
        wait_for_device()
        wall = time.perf_counter() - self.profile_start
        self.profiler.stop()
        averages = self.profiler.key_averages()
        kernels = [event for event in averages if event.device_type == torch.autograd.DeviceType.CUDA]
        device = sum(event.self_device_time_total for event in kernels if not event.is_user_annotation) / 1e6
        tables = [averages.table(sort_by="self_cuda_time_total", row_limit=40)] * ON_GPU
        tables.append(averages.table(sort_by="self_cpu_time_total", row_limit=40))
        head = f"{PROFILED_STEPS} steps: {wall:.3f} s wall time, {device:.3f} s of CUDA kernels\n\n"
        Path(self.options.profile).write_text(head + "\n\n".join(tables), encoding="utf-8")

    def watch_loader(self):
        """A patch of the data loader's iterators that takes the time for which the training process waits for them."""
        original = _BaseDataLoaderIter.__next__

        def timed(iterator):
            start = time.perf_counter()
            try:
                return original(iterator)
            finally:
                self.waits[0] += time.perf_counter() - start

        return mock.patch.object(_BaseDataLoaderIter, "__next__", timed)


class MeasuredTrainer(CPMTrainer):
    """Keeps loss tensors and times for a meter; saves nothing."""

    def __init__(self, *args, meter: Meter, **kwargs):
        super().__init__(*args, **kwargs)
        self.meter = meter
        self.remove_callback(PrinterCallback)
        self.add_callback(meter)
        meter.prepare(self)

    def get_batch_samples(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self.meter.waits[1] += time.perf_counter() - start

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        losses = self.meter.losses
        losses += [[] for _ in range(self.state.global_step + 1 - len(losses))]
        losses[-1].append(loss.detach())
        return loss

    def save_model(self, *_args, **_kwargs) -> None:
        pass

    def save_state(self) -> None:
        pass


def wait_for_device() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def matmul_tflops() -> float:
    """Measured rate of one large product: 8192^3 in bfloat16 on a GPU, 1024^3 in float32 on a CPU; 10^12 FLOP/s."""
    side, settings = (8192, {"dtype": torch.bfloat16, "device": "cuda"}) if ON_GPU else (1024, {})
    left, right = (torch.randn(side, side, **settings) for _ in range(2))
    times = []
    for _ in range(25):
        if ON_GPU:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            left @ right
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - begun)
    return 2 * side**3 / median(times[5:]) / 1e12


def host_bytes() -> int:
    """Most resident memory that this process had; 0 where /proc does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def evaluate(meter: Meter, options: argparse.Namespace) -> dict:
    """The result, from what the meter saw. All processes must call it.

    Raises:
        UserError: when a loss is not finite.
    """
    wait_for_device()
    own = {
        "losses": [float(sum(step)) for step in meter.losses],
        "peak_allocated_gib": meter.peak_allocated / GIB,
        "peak_reserved_gib": meter.peak_reserved / GIB,
        "host_gib": host_bytes() / GIB,
    }
    processes = meter.args.world_size
    everyone = over_processes(own)
    losses = [mean(of_step) for of_step in zip(*(each["losses"] for each in everyone), strict=True)]
    for number, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise UserError(f"the loss of step {number + 1} is {loss}; a lower --learning_rate may help")
    steps = range(options.warmup, meter.last)
    times = [meter.seconds(step, step + 1) for step in steps]
    total = meter.seconds(options.warmup, meter.last)
    every = sum((meter.step_counts(step) for step in steps), Counts([], 0, []))
    gradient_checkpointing = [getattr(meter.args, f"{part}_checkpointing", None) for part in ("vision", "llm")]
    done, model = step_flops(
        meter.config,
        every,
        meter.trained,
        *(meter.args.gradient_checkpointing if given is None else given for given in gradient_checkpointing),
        meter.lora_parameters,
    )
    wait, batch_wait = (median(all_[options.warmup : meter.last]) for all_ in (meter.data_wait, meter.batch_wait))
    per_step = {
        "samples": len(every.lengths),
        "tokens": sum(every.lengths),
        "supervised_tokens": every.supervised,
        "slices": len(every.patches),
        "patches": sum(every.patches),
    }
    return {
        "model": options.model,
        "method": options.method,
        "deepspeed": Path(options.deepspeed).name if options.deepspeed else None,
        "processes": processes,
        "samples_per_process": meter.args.train_batch_size * meter.args.gradient_accumulation_steps,
        "steps": options.steps,
        "step_seconds": {"median": median(times), "min": min(times), "max": max(times), "mean": total / len(times)},
        "host_step_seconds": (meter.host[meter.last] - meter.host[options.warmup]) / len(times),
        "samples_per_second": len(every.lengths) / total,
        "tokens_per_second": sum(every.lengths) / total,
        "supervised_tokens_per_second": every.supervised / total,
        "per_step": {name: count / len(times) for name, count in per_step.items()},
        "by_entry": meter.by_entry(),
        "data_wait_seconds": wait,
        "data_wait_share": wait / median(times),
        "batch_wait_seconds": batch_wait,
        **{name: max(each[name] for each in everyone) for name in own if name != "losses"},
        "tflop_per_step_done": done / len(times) / 1e12,
        "tflop_per_step_model": model / len(times) / 1e12,
        "tflops_done": done / total / processes / 1e12,
        "tflops_model": model / total / processes / 1e12,
        "parameters": meter.parameters,
        "loss": losses[meter.last - 1],
        "losses": losses,
        "device": torch.cuda.get_device_name() if ON_GPU else platform.processor() or platform.machine(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, deepspeed)},
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
    }


def table(result: Mapping) -> str:
    """The result as a table in Markdown."""
    seconds, r = result["step_seconds"], result
    rows = {
        "model": f"{r['model']}, {r['method']}, {r['deepspeed'] or 'without DeepSpeed'}",
        "device": f"{r['processes']} x {r['device']}; {', '.join(map(' '.join, r['versions'].items()))}",
        "samples per step": f"{r['samples_per_process']} x {r['processes']}",
        "parameters": f"{r['parameters']['trained']:,} trained, {r['parameters']['frozen']:,} frozen",
        "seconds per step": f"{seconds['median']:.4f} median of {r['steps']} ({seconds['min']:.4f} to "
        f"{seconds['max']:.4f}), mean {seconds['mean']:.4f}, by the host's clock {r['host_step_seconds']:.4f}",
        "samples/s": f"{r['samples_per_second']:.3f}",
        "tokens/s": f"{r['tokens_per_second']:.1f}, supervised {r['supervised_tokens_per_second']:.1f}",
        "per step": ", ".join(f"{value:.1f} {name.replace('_', ' ')}" for name, value in r["per_step"].items()),
        "data wait": f"{r['data_wait_seconds']:.4f} s per step ({r['data_wait_share']:.1%}); "
        f"batch wait {r['batch_wait_seconds']:.4f} s",
        "peak device memory": f"{r['peak_allocated_gib']:.2f} GiB allocated, {r['peak_reserved_gib']:.2f} GiB reserved",
        "peak host memory": f"{r['host_gib']:.2f} GiB resident in the training process",
        "TFLOP per step": f"{r['tflop_per_step_done']:.4g} done, {r['tflop_per_step_model']:.4g} model",
        "TFLOP/s per device": f"{r['tflops_done']:.4g} done ({r['fraction_done']:.1%}), {r['tflops_model']:.4g} model "
        f"({r['fraction_model']:.1%}), of {r['matmul_tflops']:.4g} in one large product",
        "loss": f"{r['losses'][0]:.4f} at first, {r['loss']:.4f} at last",
    }
    return "\n".join(["| name | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


@contextlib.contextmanager
def work_folder() -> Iterator[tuple[Path, bool]]:
    """A temporary folder that the processes of one machine share, and whether this process is to fill it."""
    if "LOCAL_RANK" not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="train_step-"))
    else:  # all are children of one torchrun
        name = f"train_step-{os.environ.get('MASTER_PORT')}-{os.getppid()}"
        folder = Path(tempfile.gettempdir(), name)
    fills = os.environ.get("LOCAL_RANK", "0") == "0"
    if fills:
        folder.mkdir(exist_ok=True)
    try:
        yield folder, fills
    finally:
        if fills:
            shutil.rmtree(folder, ignore_errors=True)


def finetune_arguments(options: argparse.Namespace, further: list[str], folder: Path, fills: bool) -> list[str]:
    """Command line for finetune.py; `fills` says that this process writes model and data, the others wait for it."""
    given = argparse.ArgumentParser(allow_abbrev=False)
    given.add_argument("--per_device_train_batch_size", "--batch_size", type=int, default=options.batch)
    given.add_argument("--gradient_accumulation_steps", type=int, default=1)
    sizes, _ = given.parse_known_args(further)
    steps = options.warmup + options.steps + (PROFILED_STEPS if options.profile else 0)
    samples_per_step = sizes.per_device_train_batch_size * sizes.gradient_accumulation_steps
    order = order_of_entries(options, steps, samples_per_step * int(os.environ.get("WORLD_SIZE", "1")))
    ready = folder / "ready"
    if fills:
        model = write_model(options.model, folder)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        write_data(options.pictures, order, options.answer_tokens, tokenizer, folder)
        ready.write_text(str(model))
    for _ in range(6000):
        if ready.exists() and ready.read_text():
            break
        time.sleep(0.1)
    arguments = ["--model_name_or_path", ready.read_text(), "--data_path", str(folder / "train.json")]
    arguments += ["--output_dir", str(folder / "output"), "--max_steps", str(steps)]
    arguments += ["--per_device_train_batch_size", str(options.batch), *RECIPE, *METHODS[options.method]]
    return arguments + ["--deepspeed", options.deepspeed] * bool(options.deepspeed) + further


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This file's options, and the flags for finetune.py."""
    parser = argparse.ArgumentParser(
        description="Speed and memory of training steps on random weights. Further flags go to finetune.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="2.5", help="2.5, 2.0, tiny-2.5, tiny-2.0 or a checkpoint folder")
    parser.add_argument("--method", choices=METHODS, default="lora", help="LoRA matrices or the whole language model")
    parser.add_argument("--batch", type=int, default=1, help="samples per forward pass and process")
    parser.add_argument("--deepspeed", default="", help="DeepSpeed file; empty or none: without DeepSpeed")
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--warmup", type=int, default=8, help="steps before them")
    parser.add_argument(
        "--pictures", default=PICTURES, help="sizes of pictures; text or text:N: none, and answers of N tokens"
    )
    parser.add_argument(
        "--turn",
        type=int,
        default=0,
        help="successive measured steps with one of --pictures, for benchmarks/growth.py, 2 or more; --steps then "
        "follows. 0: they change from sample to sample",
    )
    parser.add_argument("--answer_tokens", type=int, default=100, help="tokens of each of the two answers")
    parser.add_argument("--json", help="file to write the result to, as in the last line of the output")
    parser.add_argument("--profile", help="file for a profile of further steps after the measured ones")
    options, further = parser.parse_known_args(argv)
    options.pictures = options.pictures.split(",")
    options.deepspeed = "" if options.deepspeed == "none" else options.deepspeed
    for flag in (part.split("=")[0] for part in further):
        if flag in OWN_FLAGS:
            parser.error(f"{flag} is set by this benchmark; see --model, --pictures and --steps")
    if options.turn:
        options.steps = options.turn * len(options.pictures)
    if options.turn == 1 or options.turn < 0:
        parser.error("--turn must be 0, or 2 or more")
    if options.steps < 1 or options.warmup < 0:
        parser.error("--steps must be 1 or more, --warmup 0 or more")
    return options, further


def run(options: argparse.Namespace, further: list[str]) -> dict:
    """The training run, and the result of measuring it."""
    meter = Meter(options)
    with work_folder() as (folder, fills):
        patches = [
            mock.patch.object(MiniCPMV, "from_pretrained", random_model),
            mock.patch("finetune.arguments.model_folder_problems", return_value=[]),  # there are no weights
            mock.patch.object(toolkit, "CPMTrainer", partial(MeasuredTrainer, meter=meter)),
            meter.watch_loader(),
        ]
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            toolkit.train(finetune_arguments(options, further, folder, fills))
        result = evaluate(meter, options)
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    result["matmul_tflops"] = matmul_tflops()
    for kind in ("done", "model"):
        result[f"fraction_{kind}"] = result[f"tflops_{kind}"] / result["matmul_tflops"]
    return result


def main(argv: list[str] | None = None) -> None:
    """Command line of this benchmark. Exit status 3: out of device memory."""
    options, further = parse(argv)
    if options.deepspeed and "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    try:
        result = run(options, further)
    except UserError as error:
        sys.exit(f"train_step: {error}")
    except torch.cuda.OutOfMemoryError as error:
        peak = torch.cuda.max_memory_allocated() / GIB
        sys.stderr.write(f"out of memory: {str(error).splitlines()[0]}, peak {peak:.2f} GiB\n")
        sys.exit(3)
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(f"\n{table(result)}\n\n{json.dumps(result)}\n")
        if options.json:
            Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
