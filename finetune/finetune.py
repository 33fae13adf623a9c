"""Finetune MiniCPM-Llama3-V 2.5 or MiniCPM-V 2.0 on your own pictures and conversations.

    torchrun finetune/finetune.py --model_name_or_path openbmb/MiniCPM-Llama3-V-2_5 --data_path train.json \\
        --output_dir output/lora --use_lora true --learning_rate 1e-4 --deepspeed finetune/ds_config_zero2.json

The launchers finetune_ds.sh (all parameters) and finetune_lora.sh (LoRA) call it with sensible settings.
All flags: python finetune/finetune.py --help
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # the folder above in the place of this one, where `import evaluate` would find ours
    here = Path(__file__).resolve().parent  # which is not on the path with python -P
    sys.path[:] = [str(here.parent), *(path for path in sys.path if Path(path).resolve() != here)]

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from finetune.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
    check_arguments,
    checkpoint_to_resume,
    load_config,
    parse_arguments,
    trained_set_problems,
)
from finetune.bad_samples import BadSamples, leave_out_bad_samples
from finetune.checkpoints import STATE, newest_in_words, optimizer_kind, set_checkpoints_aside, set_newer_aside
from finetune.checks import (
    check_same_data,
    find_problems,
    report_problems,
    token_lengths,
    warn_of_remarks,
)
from finetune.data_files import load_samples
from finetune.dataset import SampleError, SupervisedDataset, data_collator
from finetune.deepspeed_file import setting_problems
from finetune.errors import ProcessError, UserError, is_main_of_node, over_processes
from finetune.extensions import build_problems, say_builds
from finetune.flags import hub_problem, optimizer_problem, scheduler_problem
from finetune.guards import die_with_launcher, explained, resume_command
from finetune.loaders import Load, fitting_workers, sample_bytes
from finetune.loading import (
    SETTINGS_NAME,
    checkpoint_folder,
    in_parts,
    load_extra_tensors,
    load_lora,
    load_tokenizer,
    other_base_problems,
    read_record,
    resolved_settings,
    sample_weights,
    trained_slices,
)
from finetune.machines import end_together, save_where_all_can_read, say_threads
from finetune.minicpmv import LLM_TYPES, MiniCPMV, MiniCPMVConfig
from finetune.model_card import CARD, is_edited
from finetune.model_folder import adapter_fit, described_weights, empty_adapter, empty_model, misfit, weight_problems
from finetune.places import checkpoint_room_problem
from finetune.reporting import parameter_table, plot_history, settings_record
from finetune.result_folder import files_of_result
from finetune.resume import GIVEN, recorded_flags, say_changes, schedule_problems, step_problem
from finetune.resume_check import ANEW, fit_problems
from finetune.run_lock import only_run_in
from finetune.safe_files import code_in
from finetune.trainer import CPMTrainer
from finetune.zero import GROUP_ELEMENTS

logger = logging.getLogger("finetune")


def train(argv: list[str] | None = None) -> None:
    """The whole run: arguments, data, model, training, saved files.

    Raises:
        UserError: with all problems of the arguments, or of the data, in one message.
    """
    model_args, data_args, args, lora_args = parse_arguments(argv)
    _set_up_logging(args)
    config = load_config(model_args.model_name_or_path, args.cache_dir)
    problems = check_arguments(model_args, data_args, args, lora_args, config)
    tokenizer = planned = None
    if not isinstance(config, str):
        if not trained_set_problems(args, lora_args):
            # of the room in a place that cannot be used, nothing is said
            unusable = f"--output_dir {args.output_dir}: "
            usable = bool(args.output_dir) and not any(problem.startswith(unusable) for problem in problems)
            found, planned = _trial_problems(model_args, args, lora_args, config, look_at_disk=usable)
            problems += found
        try:
            tokenizer = load_tokenizer(model_args.model_name_or_path, args.cache_dir)
        except ValueError as error:
            problems += [f"--model_name_or_path {line}" for line in str(error).splitlines()]
    problems += [*build_problems(args), *filter(None, [hub_problem(args)])]
    _stop_on(list(dict.fromkeys(problems)), "These settings cannot work:")
    say_builds(args)
    save_where_all_can_read(args)
    with only_run_in(args.output_dir, takes=args.should_save):
        _train(model_args, data_args, args, lora_args, config, tokenizer, planned)


def _train(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    lora_args: LoraArguments,
    config: MiniCPMVConfig,
    tokenizer,
    planned: torch.nn.Module,
) -> None:
    """The run, with arguments that have been checked, in an output folder that is its own.

    Args:
        planned: its model without values, what it trains set to require gradients.
    """
    if args.max_slice_nums is not None:
        config.set_max_slice_nums(args.max_slice_nums)  # saved with a full checkpoint, and used by its chat()
    if lora_args.lora_weight_path:
        _compare_slicing(config, lora_args.lora_weight_path)
    checkpoint = checkpoint_to_resume(args)
    _stop_on(code_in(checkpoint) if checkpoint else [], "This checkpoint is not loaded:")
    if checkpoint:
        flags = vars(model_args) | vars(args) | vars(lora_args)
        problems = [*_resume_problems(checkpoint, args), *schedule_problems(recorded_flags(checkpoint), args)]
        if args.max_steps > 0:  # else Trainer counts the steps
            step = read_record(Path(checkpoint, STATE)).get("global_step", 0)
            problems += filter(None, [step_problem(step, args.max_steps, args, checkpoint)])
        _stop_on(problems or fit_problems(checkpoint, planned, args, flags), "These settings cannot work:")
    make_way = partial(_make_way, checkpoint, args)
    datasets, left_out = _load_data(data_args, args, config, tokenizer, checkpoint is not None, make_way)
    train_dataset, eval_dataset = datasets["train"], datasets.get("eval")
    _keep_to_shared_memory(args, config, datasets)
    if checkpoint is not None:
        _compare_steps(checkpoint, args, len(train_dataset))
    transformers.set_seed(args.seed)
    try:
        with explained(None, args, config):
            model = load_model(model_args, args, lora_args, config)
    except (OSError, SafetensorError) as error:
        if Path(model_args.model_name_or_path).is_dir():  # whose files have been looked at
            raise
        cause = " ".join(str(error).split())
        raise ProcessError(
            f"--model_name_or_path {model_args.model_name_or_path}: cannot be loaded: {cause}"
        ) from error
    if not Path(model_args.model_name_or_path).is_dir():  # what was not here has been downloaded
        _stop_on(_weight_problems(model_args, args, config)[0], "This model cannot be used:")
    group_elements = GROUP_ELEMENTS
    if checkpoint is not None:  # with the parameter groups that it was saved with: Trainer's own, where it says none
        group_elements = resolved_settings(checkpoint).get("param_group_elements")
    resolved = {
        "model": LLM_TYPES[config.llm_type],
        "llm_type": config.llm_type,
        "slicing": config.slicing,
        "query_num": config.query_num,
        "dtype": str(args.compute_dtype).removeprefix("torch."),
        "train_samples": len(train_dataset),
        "eval_samples": len(eval_dataset) if eval_dataset else 0,
        "left_out": left_out,
        "param_group_elements": group_elements,
        "processes": args.world_size,
    }
    settings = settings_record({"model": model_args, "data": data_args, "training": args, "lora": lora_args}, resolved)
    settings[GIVEN] = args.flags_given
    if args.use_lora:  # so that merging can tell whether it is given the same base
        settings["base_weights"] = _sampled_base(model_args.model_name_or_path, args.cache_dir)
    logger.info("settings: %s", ", ".join(f"{name} {value}" for name, value in resolved.items()))
    if checkpoint is not None:
        say_changes(read_record(Path(checkpoint, SETTINGS_NAME)), settings)
    logger.info("parameters\n%s", parameter_table(model))

    bad = BadSamples(
        *(datasets, args.output_dir, data_args.bad_samples == "skip", data_args.max_bad_fraction, left_out),
    )
    trainer = CPMTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=partial(data_collator, max_length=args.model_max_length),
        processing_class=tokenizer,
        settings=settings,
        continued_adapter=lora_args.lora_weight_path or None,
        group_elements=group_elements,
        bad_samples=bad,
    )
    if trainer.predictor is not None:
        asked, cut = len(trainer.predictor.questions), trainer.predictor.left_out
        logger.info("each evaluation answers %d questions; %d are beyond --model_max_length", asked, cut)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.guard.signal:
        _stop(trainer)
    trainer.save_model()
    trainer.save_state()
    if args.should_save:
        plot_history(trainer.state.log_history, Path(args.output_dir) / "loss.png")
    if bad.skip:
        logger.info("%d bad samples were left out or masked, see %s", sum(map(bad.count, datasets)), bad.path)
    logger.info("trained on %d samples, saved to %s", len(train_dataset), Path(args.output_dir).resolve())


def _resume_problems(checkpoint: str, args: TrainingArguments) -> list[str]:
    """Why the optimizer's state of a checkpoint cannot be loaded by this run, whose DeepSpeed stage or number of
    processes is another."""
    stage = (args.deepspeed or {}).get("zero_optimization", {}).get("stage", 0)
    wanted = {1: "ZeRO-1/2", 2: "ZeRO-1/2", 3: "ZeRO-3"}.get(stage, "ZeRO-0") if args.deepspeed else "plain"
    found, processes = optimizer_kind(checkpoint), resolved_settings(checkpoint).get("processes", args.world_size)
    if found is None:
        return [f"{checkpoint}: holds no state of the optimizer (--save_only_model): take another, {ANEW}"]
    if found != wanted:
        said = {"plain": "without DeepSpeed"}
        return [
            f"{checkpoint}: was saved {said.get(found, f'with {found}')}, and this run goes on "
            f"{said.get(wanted, f'with {wanted}')}: give the DS_CONFIG (--deepspeed) that it had, {ANEW}"
        ]
    if processes != args.world_size and found in ("ZeRO-1/2", "ZeRO-3"):
        return [
            f"{checkpoint}: was saved by {processes} processes with {found}, and this run has {args.world_size}: start "
            f"as many (GPUS_PER_NODE, NNODES), {ANEW}"
        ]
    return []


def _compare_steps(checkpoint: str, args: TrainingArguments, train_samples: int) -> None:
    """Says where the steps of a resumed run will not be those of an unbroken one."""
    try:
        before = read_record(Path(checkpoint, SETTINGS_NAME))
        resolved, flags = before["resolved"], before["arguments"]["training"]
        batch = ("per_device_train_batch_size", "gradient_accumulation_steps")
        pairs = {
            "samples": (resolved["train_samples"], train_samples),
            "samples of a step": (
                resolved["processes"] * flags[batch[0]] * flags[batch[1]],
                args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps,
            ),
            "processes": (resolved["processes"], args.world_size),
            "--seed": (flags["seed"], args.seed),
        }
    except (KeyError, TypeError):  # an earlier version's
        return
    for what, (then, now) in pairs.items():
        if then != now and is_main_of_node():
            logger.warning(
                "%s: %s were %s, now %s: order of the samples or random numbers are not those of the unbroken run",
                *(checkpoint, what, then, now),
            )


def _compare_slicing(config: MiniCPMVConfig, adapter: str) -> None:
    most = trained_slices(adapter)
    if most is not None and most != config.slicing["max_slice_nums"]:
        logger.warning(
            "--lora_weight_path %s was trained with --max_slice_nums %d, this run takes %d",
            *(adapter, most, config.slicing["max_slice_nums"]),
        )


def _sampled_base(path: str, cache_dir: str | None) -> dict[str, str]:
    try:
        return sample_weights(checkpoint_folder(path, cache_dir, download=False))
    except (OSError, ValueError) as error:
        logger.warning("merging will not be able to tell whether its base is this one: %s", error)
        return {}


def _stop(trainer: CPMTrainer) -> None:
    """The end of a run that a signal stopped: what to do next, and the exit status that shells give for the signal."""
    if is_main_of_node():
        saved, anew = newest_in_words(trainer.args.output_dir)
        name = signal.Signals(trainer.guard.signal).name
        flag = "--overwrite_output_dir" if anew else "--resume_from_checkpoint"
        slurm = f" (under SLURM: the same sbatch with {flag} true)" if "SLURM_JOB_ID" in os.environ else ""
        logger.warning(
            "%s: stopped after step %d of %d; %s. To go on%s:\n%s",
            *(name, trainer.state.global_step, trainer.state.max_steps, saved, slurm),
            resume_command(sys.argv, anew),
        )
    end_together()
    sys.exit(128 + trainer.guard.signal)


def load_model(
    model_args: ModelArguments, args: TrainingArguments, lora_args: LoraArguments, config: MiniCPMVConfig
) -> torch.nn.Module:
    """The model with what shall be trained set to require gradients, under PEFT for LoRA.

    Without DeepSpeed, half-precision runs keep what is trained in float32 (under autocast) and what is frozen in half
    precision; DeepSpeed keeps its own float32 copies.
    """
    if args.deepspeed and torch.distributed.is_initialized():
        import deepspeed

        # On CPUs accelerate connects the processes without DeepSpeed, which must know of them before ZeRO-3 divides
        # the parameters among them while the checkpoint loads.
        deepspeed.init_distributed(auto_mpi_discovery=False)
    mixed = args.compute_dtype != torch.float32 and args.deepspeed is None
    trains_most = args.tune_llm and mixed
    zero3 = is_deepspeed_zero3_enabled()
    # Without ZeRO-3 tensors go from the mapped files to where they are needed, one by one: a process on a CPU holds
    # its own copy, a process with a GPU nothing in host memory.
    device_map = None if zero3 or args.device.type == "cpu" else {"": args.device}
    with in_parts() if zero3 else nullcontext():
        model = MiniCPMV.from_pretrained(
            model_args.model_name_or_path,
            config=config,
            cache_dir=args.cache_dir,
            trust_remote_code=False,
            dtype=torch.float32 if trains_most else args.compute_dtype,
            attn_implementation=model_args.attn_implementation,
            device_map=device_map,
        )
    if args.use_liger_kernel:
        use_liger_kernels(model.llm)
    model = prepare_trainable(model, args, lora_args)
    if mixed:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else args.compute_dtype)
    return model


def use_liger_kernels(llm: torch.nn.Module) -> None:
    """Fused SwiGLU from the liger-kernel package; norms, rotary embedding and loss have their own ways here.

    Trainer, which would do this by model type, knows the language model's type but not that of the model around it.
    """
    from transformers.integrations.liger import apply_liger_kernel

    others = dict.fromkeys(("rope", "rms_norm", "cross_entropy", "fused_linear_cross_entropy"), False)
    apply_liger_kernel(llm, {"swiglu": True, **others})


def prepare_trainable(model: MiniCPMV, args: TrainingArguments, lora_args: LoraArguments) -> torch.nn.Module:
    """Freeze and unfreeze by the `--tune_*` flags; wrap in PEFT with `--use_lora`."""
    peft_model = None
    if args.use_lora:
        model.requires_grad_(False)
        # DeepSpeed keeps float32 copies of what is trained, and ZeRO-3 takes tensors of one dtype only.
        peft_model = _with_lora(model, lora_args, in_float32=not args.deepspeed)
    trained = {
        "llm": args.tune_llm,
        "llm.model.embed_tokens": args.tune_embed_tokens and (args.tune_llm or args.use_lora),
        "vpm": args.tune_vision,
        "resampler": args.tune_resampler,
    }
    for name, parameter in model.named_parameters():
        # PEFT decides about its own matrices and about modules_to_save, whose originals must stay as they are.
        if ".lora_" in name or ".modules_to_save." in name or ".original_module." in name:
            continue
        # the embeddings' entry is the more special of the two that match them
        module = max((m for m in trained if name.startswith(f"{m}.")), key=len)
        by_peft = args.use_lora and parameter.requires_grad  # biases that --lora_bias asked for
        parameter.requires_grad_(trained[module] or by_peft)
    return model if peft_model is None else peft_model


def _with_lora(model: MiniCPMV, lora_args: LoraArguments, in_float32: bool) -> PeftModel:
    if lora_args.lora_weight_path and model.device.type == "meta":  # a trial of the settings, see _trial_problems
        peft_model = empty_adapter(model, lora_args.lora_weight_path)
    elif lora_args.lora_weight_path:
        peft_model = load_lora(model, lora_args.lora_weight_path, trainable=True, in_float32=in_float32)
        load_extra_tensors(peft_model, lora_args.lora_weight_path)
    else:
        lora_config = LoraConfig(
            r=lora_args.lora_r,
            lora_alpha=lora_args.lora_alpha,
            lora_dropout=lora_args.lora_dropout,
            target_modules=lora_args.target_modules,
            bias=lora_args.lora_bias,
            modules_to_save=lora_args.modules_to_save,
            layer_replication=lora_args.layer_replication,
            task_type="CAUSAL_LM",
        )
        peft_model = get_peft_model(model, lora_config, autocast_adapter_dtype=in_float32)
    base = Path(model.name_or_path)
    for adapter in peft_model.peft_config.values():  # a relative path would be looked for from wherever it is loaded
        adapter.base_model_name_or_path = str(base.resolve()) if base.is_dir() else model.name_or_path
    return peft_model


def _trial_problems(
    model_args: ModelArguments,
    args: TrainingArguments,
    lora_args: LoraArguments,
    config: MiniCPMVConfig,
    look_at_disk: bool,
) -> tuple[list[str], torch.nn.Module | None]:
    """Tries the settings on a model without values: whether the files hold the tensors that it needs, a LoRA target
    matches, a checkpoint has room. And that model, with what the run trains set to require gradients."""
    base, adapter = model_args.model_name_or_path, lora_args.lora_weight_path
    problems, model = _weight_problems(model_args, args, config)
    if model is None:
        return problems, None
    try:
        if adapter:
            resolved_settings(adapter)
            problems += other_base_problems(f"--model_name_or_path {base}", adapter, base, args.cache_dir)
    except (OSError, ValueError) as error:
        problems.append(f"--lora_weight_path {adapter}: {error}")
    try:
        model = prepare_trainable(model, args, lora_args)
    except (ValueError, TypeError, KeyError) as error:
        return [*problems, f"LoRA cannot be set up: {' '.join(str(error).split())}"], None
    if adapter:
        why = misfit(adapter, adapter_fit(model, adapter, base)[1])
        problems += [f"--lora_weight_path {why}"] if why else []
    if twice := _trained_twice(model):
        problems.append(
            f"--lora_target_modules: {len(twice)} matrices would be trained both in full and by LoRA ({twice[0]}): "
            "leave them out, or set the flag of their part to false (--tune_vision, --tune_resampler, "
            "--tune_embed_tokens)"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        problems.append(
            "nothing would be trained; look at --tune_vision, --tune_llm, --tune_resampler, --tune_embed_tokens"
        )
        return problems, None
    problems += setting_problems(args, model)
    if look_at_disk:
        problems += checkpoint_room_problem(model, args, base)
    return [*problems, *filter(None, [optimizer_problem(args, model), scheduler_problem(args)])], model


def _weight_problems(
    model_args: ModelArguments, args: TrainingArguments, config: MiniCPMVConfig
) -> tuple[list[str], MiniCPMV | None]:
    """Whether the files of weights, where they are here, hold the tensors that the configuration describes; and the
    model without values."""
    path = model_args.model_name_or_path
    where = f"--model_name_or_path {path}"
    try:
        model = empty_model(config)
    except ValueError as error:
        return [f"{where}: {error}"], None
    try:
        found = described_weights(checkpoint_folder(path, args.cache_dir, download=False))
    except (OSError, ValueError):  # of a folder `check_arguments` says it; of a name on the hub, not all is here yet
        return [], model
    return weight_problems(where, model, found), model


def _trained_twice(model: torch.nn.Module) -> list[str]:
    """Names of layers with LoRA whose own matrix is trained in full."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    return [
        name.removeprefix("base_model.model.") for name, layer in layers if layer.get_base_layer().weight.requires_grad
    ]


def _make_way(checkpoint: str | None, args: TrainingArguments) -> None:
    """Move aside what lies in the output folder and is not what this run goes on from; all processes must call it."""
    problems, card = [], Path(args.output_dir, CARD)
    result = files_of_result(card.parent) + ([card] if card.is_file() and not is_edited(card) else [])
    try:
        if checkpoint is not None and args.should_save:
            set_newer_aside(checkpoint, args.output_dir, result)
        elif args.overwrite_output_dir and args.should_save:
            set_checkpoints_aside(args.output_dir, result=result)
    except OSError as error:
        problems.append(f"--output_dir {args.output_dir}: what an earlier run left cannot be moved aside: {error}")
    _stop_on(problems, "These settings cannot work:")


def _load_data(
    data_args: DataArguments,
    args: TrainingArguments,
    config: MiniCPMVConfig,
    tokenizer,
    resuming: bool,
    make_way: Callable[[], None] = lambda: None,
) -> tuple[dict[str, SupervisedDataset], dict[str, int]]:
    """The data sets `train` and, with evaluation, `eval`, all of whose samples can be used, and how many were left
    out of each.

    Args:
        make_way: called when the data can be used, before anything is written into the output folder.
    """
    paths = {"train": data_args.data_path}
    if data_args.eval_data_path and args.eval_strategy == "no":
        logger.warning("--eval_data_path is not used: --eval_strategy is no")
    elif data_args.eval_data_path:
        paths["eval"] = data_args.eval_data_path
    samples, problems = {}, []
    for split, files in paths.items():
        try:
            samples[split] = load_samples(files)
        except ValueError as error:
            problems.append(str(error))
    _stop_on(problems, "These data files cannot be read:")
    check_same_data(samples)
    datasets = {
        split: SupervisedDataset.for_checkpoint(
            config,
            tokenizer,
            samples[split],
            args.model_max_length,
            data_args.image_folder,
            data_args.image_folder_only,
        )
        for split in paths
    }
    left_out, problems = {}, []
    if data_args.bad_samples == "skip":
        limits = (args.output_dir, data_args.max_bad_fraction)
        left_out = leave_out_bad_samples(datasets, *limits, resuming, before_writing=make_way)
    else:
        problems = [problem for dataset in datasets.values() for problem in find_problems(dataset)]
    warn_of_remarks(datasets.values())
    _stop_on(problems, "These samples cannot be used (--bad_samples skip would leave them out):")
    if data_args.bad_samples != "skip":
        make_way()
    if args.train_sampling_strategy == "group_by_length":
        datasets["train"].lengths = token_lengths(datasets["train"])
    batch, found = args.train_batch_size * args.world_size, len(datasets["train"])
    if args.dataloader_drop_last and found < batch:
        _stop_on(
            [f"--dataloader_drop_last true would leave out all {found} samples, since {batch} are a batch"],
            "These settings cannot work:",
        )
    return datasets, left_out


def _keep_to_shared_memory(
    args: TrainingArguments, config: MiniCPMVConfig, datasets: Mapping[str, SupervisedDataset]
) -> None:
    """Lowers `--dataloader_num_workers` to what shared memory has room for."""
    pixels = config.slicing["scale_resolution"], config.slicing["patch_size"]
    sizes = {name: sample_bytes(of.loads[:, 1], args.model_max_length, *pixels) for name, of in datasets.items()}
    # a step's batches are kept until it is computed, and accelerate asks for one ahead
    loads = [Load(sizes["train"], args.train_batch_size, args.gradient_accumulation_steps + 1)]
    if "eval" in sizes:  # training's own batches wait meanwhile
        loads.append(Load(sizes["eval"], args.eval_batch_size, kept=2))
    asked, prefetched = args.dataloader_num_workers, args.dataloader_prefetch_factor
    args.dataloader_num_workers = fitting_workers(loads, asked, "--dataloader_num_workers", prefetched)
    if not args.dataloader_num_workers:  # which needs no other settings of loader processes, nor takes them
        args.dataloader_prefetch_factor = args.dataloader_multiprocessing_context = None
        args.dataloader_persistent_workers = False


def _stop_on(problems: list, title: str) -> None:
    """Stops all processes where one has problems, which need not be the others' (a file that one machine lacks)."""
    everyone = over_processes(problems)
    if not any(everyone):
        return
    if all(each == everyone[0] for each in everyone):
        raise UserError(f"{title}\n{report_problems(everyone[0])}")
    own = [f"process {rank}: {problem}" for rank, each in enumerate(everyone) for problem in each]
    raise UserError(f"{title}\n{report_problems(own)}")


def _set_up_logging(args: TrainingArguments) -> None:
    level = logging.INFO if args.process_index == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")


def main() -> None:
    """Command line: problems found before training end in their message and exit status 1, without a traceback."""
    die_with_launcher()
    say_threads()
    try:
        train()
        end_together()
    except (ProcessError, SampleError) as error:  # met by one process
        sys.exit(f"finetune.py: {error}")
    except UserError as error:  # every process finds the same
        sys.exit(f"finetune.py: {error}" if is_main_of_node() else 1)


if __name__ == "__main__":
    main()
