"""What other programs call the settings: transformers' Trainer, fairseq, DeepSpeed, nanoGPT."""

from collections.abc import Iterable

SYNONYMS = {
    "run_dir": ("output_dir", "out_dir", "save_dir", "logging_dir"),
    "seed": ("random_seed", "data_seed"),
    "data.shards": ("train_file", "data_dir", "dataset", "dataset_name"),
    "data.tokenizer": ("tokenizer_name", "tokenizer_name_or_path", "tokenizer_path"),
    "data.seq_len": (
        "block_size",
        "max_length",
        "max_seq_length",
        "max_seq_len",
        "seq_length",
        "sequence_length",
        "tokens_per_sample",
    ),
    "data.workers": ("dataloader_num_workers", "num_workers"),
    "training.max_steps": (
        "max_iters",
        "max_train_steps",
        "max_update",
        "num_steps",
        "total_steps",
        "train_steps",
    ),
    "training.epochs": ("max_epoch", "max_epochs", "num_epochs", "num_train_epochs"),
    "training.precision": ("amp", "bf16", "dtype", "fp16", "mixed_precision", "tf32"),
    "training.compile": ("torch_compile",),
    "masking.ratio": ("mask_prob", "mask_ratio", "masking_ratio", "mlm_probability"),
    "masking.unit": ("whole_word_masking", "wwm"),
    "model.hidden_size": ("d_model", "embed_dim", "encoder_embed_dim", "n_embd"),
    "model.num_hidden_layers": ("encoder_layers", "n_layer", "n_layers", "num_layers"),
    "model.num_attention_heads": ("encoder_attention_heads", "n_head", "n_heads", "num_heads"),
    "model.intermediate_size": ("encoder_ffn_embed_dim", "ffn_dim"),
    "model.hidden_dropout_prob": ("dropout", "hidden_dropout"),
    "model.attention_probs_dropout_prob": ("attention_dropout",),
    "batch.global_batch_size": ("batch_size", "gradient_accumulation_steps", "train_batch_size"),
    "batch.micro_batch_size": (
        "per_device_batch_size",
        "per_device_train_batch_size",
        "train_micro_batch_size_per_gpu",
    ),
    "optimizer.name": ("optim", "optimizer_type"),
    "optimizer.learning_rate": ("lr", "max_lr", "peak_lr"),
    "optimizer.schedule": ("lr_scheduler", "lr_scheduler_type"),
    "optimizer.warmup_steps": ("num_warmup_steps", "warmup", "warmup_ratio", "warmup_updates"),
    "optimizer.adam_beta1": ("beta1", "betas", "adam_betas"),
    "optimizer.adam_beta2": ("beta2",),
    "optimizer.adam_eps": ("adam_epsilon", "eps", "epsilon"),
    "optimizer.weight_decay": ("wd",),
    "optimizer.max_grad_norm": ("clip_norm", "grad_clip", "gradient_clipping"),
    "checkpoint.every_steps": ("save_interval", "save_steps"),
    "checkpoint.keep": ("keep_last", "save_total_limit"),
    "evaluation.every_steps": ("eval_interval", "eval_steps"),
}
_KNOWN_AS = {other: key for key, others in SYNONYMS.items() for other in others}
_LAUNCHERS = (
    "deepspeed",
    "device",
    "fsdp",
    "local-rank",
    "local_rank",
    "master_addr",
    "master_port",
    "nnodes",
    "no_cuda",
    "nproc_per_node",
    "num_machines",
    "num_processes",
    "use_cpu",
    "world_size",
)


def hint(key: str, known: Iterable[str]) -> str | None:
    """What to do about a key that is no setting, where its last word tells.

    Args:
        known: all settings.
    """
    last = key.rpartition(".")[2]
    if last in _LAUNCHERS:
        return (
            f"{last} is the launcher's: give it to accelerate launch or torchrun, not to the "
            "program (docs/distributed.md)"
        )
    called = _KNOWN_AS.get(last)
    if called is not None:
        return f"kantai's setting for it is {called!r}"
    alike = [setting for setting in known if setting.rpartition(".")[2] == last]
    return f"the nearest known one is {alike[0]!r}" if len(alike) == 1 else None
