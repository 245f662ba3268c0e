"""Pretrain RoBERTa masked language models from raw text, on a laptop, one GPU or a SLURM cluster.

The package, bottom first. A folder imports only from those above it (``tests/test_layout.py``)::

    output.py        What leaves the process: no secrets, no escape sequences
    errors.py        How bad input ends: one line, exit code 2
    config/          What a run is: settings, batch arithmetic
    storage/         Files and folders published whole, and fetched once a node
    cluster/         Rank, node, time limit, signals
    data/            What the model is shown: shards, shuffle, packing, masking, batches, loader
    preprocessing/   From text to a tokenizer and shards, done once
    model/           The RoBERTa that is trained
    optim/           AdamW, Muon, learning rate schedule
    checkpoint/      What is kept, and which checkpoints are complete
    distributed/     One optimizer step on N ranks; alone knows Accelerate and DeepSpeed
    evaluation/      Held-out loss, filled prompts
    training/        The loop, run directory, metrics, saving
    export.py        A stock Hugging Face folder
    diagnostics/     preflight, verify, chaos
"""

__version__ = "0.2.0"
