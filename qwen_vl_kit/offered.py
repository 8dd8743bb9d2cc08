"""Which of TRL's options can be used: each does what it says, or is refused in a sentence before anything is loaded.

Wraps no step: the room `options` has its parser's help list only what is offered (`hide`), asks `check` about a command
line, and asks `check_possible` what would fail later: a missing package, no API key, settings that don't go together.
"""

import copy
from argparse import SUPPRESS

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from qwen_vl_kit.sentences import first_line


def words(text):
    return set(text.split())


# Seen to work, with trl 1.14.2 and transformers 5.17.
WORKS = words(
    """
    output_dir seed max_steps num_train_epochs learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm loss_type max_length
    per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs
    bf16 fp16 use_cpu full_determinism
    dataloader_num_workers dataloader_prefetch_factor dataloader_persistent_workers
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size load_best_model_at_end
    save_strategy save_steps save_total_limit save_only_model resume_from_checkpoint
    logging_strategy logging_steps logging_first_step include_num_input_tokens_seen skip_memory_metrics
    log_level disable_tqdm report_to run_name
    push_to_hub hub_model_id hub_private_repo hub_token
    ddp_backend ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters
    """
)
# Passed on to the libraries, their effect not seen yet: they need a GPU, several machines, or Trackio.
UNSEEN = words(
    """
    tf32 torch_empty_cache_steps dataloader_pin_memory log_level_replica log_on_each_node
    project trackio_space_id trackio_bucket_id trackio_static_space_id
    """
)
# Why the others are not offered, and what to do instead.
REASONS = {
    "completion_only_loss assistant_only_loss": "the loss always counts the answer, and only the answer",
    "label_smoothing_factor": "on this model the trainer smooths labels that are one token off, or fails. Against "
    "overfitting use --lora_dropout or --weight_decay",
    "chat_template_path eos_token": "it would change how the saved adapter is asked, and not how it is trained. "
    "Choose a model that has the chat template you want",
    "pad_to_multiple_of pad_token": "the model's processor pads each batch to its longest sample",
    "truncation_mode": "no answer is cut. --max_length leaves out longer rows",
    "packing packing_strategy eval_packing padding_free": "TRL can't pack images. Samples of like length share a step, "
    "so there is little padding",
    "dataset_text_field": "name the column with --text_column",
    "dataset_kwargs dataset_num_proc remove_unused_columns label_names": "the script makes samples and labels "
    "itself, as they are needed. For more processes use --dataloader_num_workers",
    "data_seed train_sampling_strategy length_column_name shuffle_dataset dataloader_drop_last dataloader_in_order "
    "accelerator_config": "the script puts the rows in order itself. Change the order with --seed",
    "dataloader_multiprocessing_context": "workers that are started another way would run the whole script again",
    "model_init_kwargs": "the script loads the model itself. Use --model_name_or_path, --load_in_4bit, or --bf16",
    "trust_remote_code": "no code that comes with a model is run",
    "router_aux_loss_coef": "mixture-of-experts models have not been tried",
    "optim_target_modules": "choose the layers that get adapters with --lora_target_modules",
    "use_liger_kernel liger_kernel_config": "it has not been tried. On a GPU, the script uses Unsloth's kernels",
    "torch_compile torch_compile_backend torch_compile_mode": "it compiles again for batches of another size: 75 s "
    "instead of 0.6 s for 16 small steps on a CPU",
    "activation_offloading": "it fails without a GPU and has not been tried on one. Use --gradient_checkpointing true",
    "auto_find_batch_size": "the script finds the micro-batch that fits, and keeps the effective batch. Leave it out",
    "neftune_noise_alpha": "its noise would double whenever memory runs out and training resumes with a smaller split",
    "use_cache": "reading always uses the cache, and training never does",
    "bf16_full_eval fp16_full_eval": "the trainer ignores it during training",
    "prediction_loss_only eval_accumulation_steps eval_do_concat_batches eval_use_gather_object include_for_metrics "
    "batch_eval_metrics": "the trainer measures only the loss. Scores are the script's own",
    "metric_for_best_model greater_is_better": "the best checkpoint is the one with the lowest validation loss",
    "logging_nan_inf_filter debug": "a loss or gradient that is NaN or infinite ends the run, and its rows are named",
    "average_tokens_across_devices": "without it, several processes would learn something else than one",
    "save_on_each_node": "the first machine saves. Let --output_dir be a folder that all machines see",
    "enable_jit_checkpoint": "SIGTERM has the script save a checkpoint anyway",
    "ignore_data_skip": "a resumed run would train on the same rows again",
    "restore_callback_states_from_checkpoint": "early stopping counts on by itself; no other callback has a state",
    "do_train do_eval do_predict": "the script always reads, trains, and reads again. For validation losses during "
    "training use --eval_strategy steps",
    "deepspeed fsdp fsdp_config parallelism_config": "for a model too large for one GPU use accelerate launch with "
    "qwen_vl_kit/fsdp.yaml, see docs/gpus.md",
    "local_rank": "start several processes with torchrun or accelerate launch, see docs/gpus.md",
    "ddp_static_graph": "with it, two processes computed other gradients than one",
    "hub_strategy hub_always_push hub_revision": "the adapter is pushed once, at the end, to the main branch",
}
REFUSED = {name: reason for names, reason in REASONS.items() for name in names.split()}

# Options without any effect unless another one is set: {option: (that one, what it has to be)}.
NEEDS = {
    **dict.fromkeys(
        ("eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size", "load_best_model_at_end"),
        ("eval_strategy", "steps"),
    ),
    **dict.fromkeys(("dataloader_prefetch_factor", "dataloader_persistent_workers"), ("dataloader_num_workers", "2")),
    **dict.fromkeys(("hub_model_id", "hub_private_repo"), ("push_to_hub", "true")),
    **dict.fromkeys(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), ("report_to", "trackio")
    ),
    "run_name": ("report_to", "wandb"),
}  # fmt: skip
UNSET = (None, False, 0, "no", "none", [], ["none"])


def hide(parser):
    """Takes what is not offered out of a parser's help, and keeps its defaults, before a config file replaces them."""
    # Reversed: of --name and --no_name, which share a name, argparse takes the default of the first.
    parser.usual = {action.dest: action.default for action in reversed(parser._actions)}
    for action in parser._actions:
        if action.dest in REFUSED:
            action.help = SUPPRESS


def check(options, usual, error):
    """Calls `error` with a sentence for the first of the parsed `options` that can't be had.

    `usual` is {name: value} of a command line that sets nothing. Options are checked before the trainer's class makes
    something else of them, or fails on them.
    """
    changed = [name for name, value in vars(options).items() if name in usual and value != usual[name]]
    for name in changed:
        if name in REFUSED:
            error(f"--{name} is not offered: {REFUSED[name]}")
    for name in changed:
        other, value = NEEDS.get(name, (None, None))
        if other and getattr(options, name) not in UNSET and getattr(options, other) in UNSET:
            error(f"--{name} does nothing without --{other}, such as --{other} {value}")
    if options.bf16 and not (options.use_cpu or torch.cuda.is_available()):
        error("--bf16 true needs a GPU, or --use_cpu true. Leave it out: the script takes what the machine has")
    if options.use_cpu and torch.cuda.is_available():
        error("--use_cpu leaves the GPU to Unsloth. To train on the CPU put CUDA_VISIBLE_DEVICES= before the command")
    check_saving(options, changed, error)


def check_saving(options, changed, error):
    """With validation losses, checkpoints are saved when those are measured, and the best one becomes the adapter."""
    if options.save_strategy == "best":
        error("--save_strategy best is not offered: --eval_strategy steps keeps the best checkpoint, and the last")
    if options.load_best_model_at_end and options.save_strategy == "no":
        error("--load_best_model_at_end needs checkpoints: leave out --save_strategy no")
    if options.eval_strategy == "epoch" and "eval_steps" in changed:
        error("--eval_strategy epoch takes no --eval_steps: leave out one of them")
    both = "no" not in (options.eval_strategy, options.save_strategy)
    best = both and options.load_best_model_at_end is not False
    if best and "save_steps" in changed and options.save_steps != options.eval_steps:
        error(
            "with --eval_strategy, checkpoints are saved when the validation loss is measured: leave out --save_steps, "
            "or keep the last checkpoint rather than the best with --load_best_model_at_end false"
        )
    if options.load_best_model_at_end:  # The trainer's class would compare save_steps. `options` sets it, with those
        options.load_best_model_at_end = None


def check_possible(options, error):
    """Calls `error` with a sentence for what would fail only after the model has been loaded and has read."""
    check_trackers(options, error)
    check_optimizer(options, error)
    check_schedule(options, error)


def check_trackers(options, error):
    for name in options.report_to:
        try:
            get_reporting_integration_callbacks([name])[0]()  # only the trackers themselves know what they need
        except Exception as reason:
            error(f"--report_to {name} can't be used: {first_line(reason)}")
    if "wandb" in options.report_to and options.process_index == 0:
        import wandb

        if wandb.setup().settings.mode not in ("offline", "disabled", "dryrun"):
            try:
                wandb.login()  # in a terminal it asks for the key, now rather than after the first reading
            except Exception as reason:
                error(f"--report_to wandb: {first_line(reason)}. Run wandb login, or set WANDB_MODE=offline")


def check_optimizer(options, error):
    """Has the optimizer take a step, and looks whether it uses what is set for it."""
    name = options.optim.value
    if name.startswith(("galore", "apollo", "lomo", "adalomo")):
        error(f"--optim {name} is not offered: it is made for whole layers, and only adapters train. Try adamw_8bit")
    if name.startswith("schedule_free"):
        error(f"--optim {name} is not offered: the adapter would be saved with the wrong weights. Try adamw_8bit")

    def settings(**changes):
        changed = copy.copy(options)
        vars(changed).update(changes)
        return Trainer.get_optimizer_cls_and_kwargs(changed)

    weights = torch.nn.Parameter(torch.zeros(64, 64, device=options.device))
    weights.grad = torch.zeros_like(weights)
    try:
        optimizer, how = settings()
        optimizer([weights], **how).step()
    except Exception as reason:  # whatever it is, training would end with it
        given = f" --optim_args {options.optim_args}" if options.optim_args else ""
        error(f"--optim {name}{given} can't be used: {first_line(reason)}")
    arguments = options.optim_args.split(",") if options.optim_args else []
    tried = [(f"optim_args {part}", {"optim_args": ",".join({*arguments} - {part})}) for part in arguments]
    tried += [(part, {part: getattr(type(options), part)}) for part in ("adam_beta1", "adam_beta2", "adam_epsilon")]
    for part, change in tried:
        if change.items() <= vars(options).items():
            continue  # as it is without it
        if settings(**change)[1] == how:
            error(f"--optim {name} does not use --{part}: leave it out")


def check_schedule(options, error):
    name, how = options.lr_scheduler_type.value, options.lr_scheduler_kwargs
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=options.learning_rate)
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=100, scheduler_specific_kwargs=how)
    except Exception as reason:
        error(f"--lr_scheduler_type {name} can't be used with --lr_scheduler_kwargs {how}: {first_line(reason)}")
    if name.startswith("constant") and how:
        error(f"--lr_scheduler_type {name} does not use --lr_scheduler_kwargs: leave it out")
    if name in ("constant", "reduce_lr_on_plateau", "greedy") and options.warmup_steps not in (
        0,
        type(options).warmup_steps,
    ):
        error(f"--lr_scheduler_type {name} has no warm-up: leave out --warmup_steps, or use constant_with_warmup")
