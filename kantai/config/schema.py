"""Every setting of a run: its type, default, range and meaning.

Settings are typed, nested and frozen, and refused at birth where they are wrong.
"""

import sys
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kantai.config.batch_plan import BatchShape

Share = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]

# A field so marked may differ when a run is resumed: it changes the run's speed or its folders, not
# its result.
MAY_CHANGE: dict[str, Any] = {"may_change": True}
# Dropout is drawn anew for each micro-step, so what decides their size then decides the result.
MAY_CHANGE_WITHOUT_DROPOUT: dict[str, Any] = {"may_change": "without dropout"}


class Section(BaseModel):
    """A frozen group of settings. It knows no keys but its own and converts no types silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which tokens, cut into which sequences."""

    shards: str = Field(
        description="folder written by tokenize_corpus.py, or its URL (s3://, gs://, hf://, "
        "https://, ...)",
        json_schema_extra=MAY_CHANGE,
    )
    tokenizer: str = Field(
        description="folder of the tokenizer that the shards were made with",
        json_schema_extra=MAY_CHANGE,
    )
    seq_len: int = Field(512, ge=8, description="tokens a sequence, <s> included")
    packing: Literal["contiguous", "isolated", "padded"] = Field(
        "contiguous",
        description="contiguous: the token stream cut into full sequences; isolated: the same, but "
        "documents do not see each other; padded: one document a sequence",
    )
    shuffle_window: Positive = Field(
        64,
        description="sequences are shuffled within windows of this many shards; shards are "
        "shuffled, too",
    )
    workers: NotNegative = Field(
        0, description="data-loader processes a rank", json_schema_extra=MAY_CHANGE
    )
    verify_hashes: bool | None = Field(
        None,
        description="compare the shards with their hashes at every start; default: up to 4 GiB, "
        "and sizes alone beyond",
        json_schema_extra=MAY_CHANGE,
    )
    cache_dir: str | None = Field(
        None,
        description="folder on each node for shards that come from a URL; default: below the "
        "temporary folder",
        json_schema_extra=MAY_CHANGE,
    )
    cache_gb: float = Field(
        100.0,
        gt=0,
        description="maximum size of that folder, in gigabytes",
        json_schema_extra=MAY_CHANGE,
    )


class MaskingConfig(Section):
    """Which tokens are hidden, and behind what."""

    unit: Literal["token", "word", "span"] = Field(
        "token",
        description="what is hidden as a whole: tokens, words of the text, or spans of 3.8 words "
        "on average (SpanBERT)",
    )
    ratio: float = Field(
        0.15, gt=0, lt=1, description="share of a sequence's tokens that is to be predicted"
    )
    final_ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="ratio at the last step, reached linearly; default: the ratio does not change",
    )
    mask_share: Share = Field(0.8, description="share of those tokens that is shown as <mask>")
    random_share: Share = Field(
        0.1,
        description="share of those tokens that is shown as a random token; the rest is shown as "
        "it is",
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> "MaskingConfig":
        if self.mask_share + self.random_share > 1:
            raise ValueError("mask_share + random_share must not exceed 1")
        return self


class ModelConfig(Section):
    """A transformers RobertaConfig. The defaults are roberta-base's."""

    hidden_size: Positive = Field(768, description="width")
    num_hidden_layers: Positive = Field(12, description="layers")
    num_attention_heads: Positive = Field(
        12, description="attention heads; must divide hidden_size"
    )
    intermediate_size: Positive = Field(3072, description="width of the feed-forward layers")
    hidden_dropout_prob: Probability = Field(0.1, description="dropout on hidden states")
    attention_probs_dropout_prob: Probability = Field(
        0.1, description="dropout on attention weights"
    )
    initializer_range: float = Field(
        0.02, gt=0, description="standard deviation of the initial weights"
    )
    position_init: Literal["normal", "sinusoidal"] = Field(
        "normal",
        description="initial position embeddings; sinusoidal ones can be learned as well, but a "
        "shift is a rotation from the start",
    )
    layer_norm_eps: float = Field(1e-5, gt=0, description="epsilon of the layer norms")
    vocab_size: Positive | None = Field(
        None,
        description="rows of the embedding; default: the tokenizer's largest id + 1, rounded up "
        "to a multiple of 64",
    )
    max_position_embeddings: Positive | None = Field(
        None,
        description="default: data.seq_len + 2, as RoBERTa counts them, or more where the "
        "tokenizer's id of <pad> is above 1",
    )

    @property
    def has_dropout(self) -> bool:
        """Whether anything is dropped at random."""
        return max(self.hidden_dropout_prob, self.attention_probs_dropout_prob) > 0

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size "
                f"{self.hidden_size}"
            )
        return self


class BatchConfig(Section):
    """How many sequences make a step.

    Gradient accumulation follows from these two and the world size.
    """

    global_batch_size: Positive = Field(256, description="sequences a step, over all ranks")
    micro_batch_size: Positive = Field(
        32,
        description="most sequences that a rank computes at once: what fits its memory",
        json_schema_extra=MAY_CHANGE_WITHOUT_DROPOUT,
    )


class StageConfig(Section):
    """An early part of a run, with shorter sequences or smaller batches."""

    until_step: Positive = Field(description="step at which the stage ends")
    seq_len: int | None = Field(None, ge=8, description="default: data.seq_len")
    global_batch_size: Positive | None = Field(None, description="default: batch.global_batch_size")


class OptimizerConfig(Section):
    """AdamW or Muon, and the learning rate."""

    name: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: for the matrices between embedding and vocabulary, with AdamW for the "
        "rest, at one learning rate",
    )
    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate")
    schedule: Literal["linear", "cosine", "wsd"] = Field(
        "linear", description="decay to 0: linear, cosine, or wsd (stable, then linear)"
    )
    warmup_steps: NotNegative = Field(0, description="steps of linear warmup from 0")
    decay_steps: Positive | None = Field(
        None, description="steps of the final decay of wsd; default: a tenth of the run"
    )
    adam_beta1: Probability = Field(0.9, description="decay of the first moment")
    adam_beta2: Probability = Field(0.98, description="decay of the second moment")
    adam_eps: float = Field(1e-6, gt=0, description="added to the root of the second moment")
    muon_momentum: Probability = Field(0.95, description="decay of Muon's momentum")
    weight_decay: float = Field(
        0.01, ge=0, description="decay of matrices; biases and layer norms never decay"
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="gradients are clipped to this norm; 0: never"
    )


class TrainingConfig(Section):
    """How long, and in what arithmetic. Give exactly one of max_steps and epochs."""

    max_steps: Positive | None = Field(None, description="length of the run in steps")
    epochs: float | None = Field(
        None, gt=0, description="length of the run in passes over the training split"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="arithmetic of matrix products and type of what moves between them; weights, "
        "moments and gradients are always fp32, and fp16 has its losses scaled",
    )
    compile: bool = Field(
        False,
        description="have torch.compile fuse what lies between a layer's matrix products: some "
        "seconds at the first start, kept for later ones; not done under ZeRO-3",
        json_schema_extra=MAY_CHANGE,
    )

    log_every_steps: Positive = Field(
        1,
        description="steps between records of metrics, which have the means over these steps; a "
        "skipped step always has a record of its own, and every checkpoint has one",
        json_schema_extra=MAY_CHANGE,
    )

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingConfig":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of max_steps and epochs")
        return self


class CheckpointConfig(Section):
    """When the state of the run is saved, and how much of it is kept."""

    every_steps: Positive | None = Field(
        None,
        description="steps between checkpoints; one more is saved at the end. Default: every ten "
        "minutes and at evaluations, or less often where saving would hold training up for over "
        "2 % of the time",
        json_schema_extra=MAY_CHANGE,
    )
    keep: int = Field(
        3,
        ge=2,
        description="newest checkpoints kept; at least two. The best is kept, too: the one with "
        "the lowest held-out loss, if checkpoints are saved at evaluations",
        json_schema_extra=MAY_CHANGE,
    )


class FailuresConfig(Section):
    """What is done about bad numbers, hangs and flipped bits."""

    max_skipped: Positive = Field(
        3,
        description="steps skipped in a row for bad numbers, after which the run goes back before "
        "them and skips their data",
    )
    spike_factor: float | None = Field(
        20.0,
        gt=1,
        description="a step is skipped when its loss or gradient norm is this many times the "
        "median of the last 100 steps; null: only when one is not finite",
        json_schema_extra=MAY_CHANGE,
    )
    hang_seconds: Positive = Field(
        1800,
        description="seconds without a finished step, after which every rank writes the stacks of "
        "its threads to RUN/stacks and exits",
        json_schema_extra=MAY_CHANGE,
    )
    compare_replicas_every: Positive | None = Field(
        None,
        description="steps between comparisons of the ranks' weights, bit by bit; also done before "
        "every save; default: never",
        json_schema_extra=MAY_CHANGE,
    )


class EvaluationConfig(Section):
    """When the held-out split is evaluated, and on how much of it."""

    every_steps: Positive = Field(
        1000,
        description="steps between evaluations; one more follows the last step",
        json_schema_extra=MAY_CHANGE,
    )
    max_sequences: Positive = Field(
        4096,
        description="maximum number of held-out sequences evaluated",
        json_schema_extra=MAY_CHANGE,
    )
    prompts: list[str] = Field(
        [],
        description="texts with one <mask> to fill in; default: some from the held-out split",
        json_schema_extra=MAY_CHANGE,
    )


class Config(Section):
    """A whole run."""

    run_dir: str = Field(
        description="folder of everything the run writes", json_schema_extra=MAY_CHANGE
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="of the initial weights, the sample order, masks and dropout"
    )
    data: DataConfig
    training: TrainingConfig
    masking: MaskingConfig = MaskingConfig()
    model: ModelConfig = ModelConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    failures: FailuresConfig = FailuresConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    stages: list[StageConfig] = Field(
        [],
        description="early parts with other sizes, as [{until_step: 1000, seq_len: 128, "
        "global_batch_size: 64}]",
    )

    @model_validator(mode="after")
    def _stages_follow(self) -> "Config":
        ends = [stage.until_step for stage in self.stages]
        max_steps = self.training.max_steps
        if ends != sorted(set(ends)):
            raise ValueError("stages: each must end after the one before")
        if ends and max_steps is not None and ends[-1] >= max_steps:
            raise ValueError(
                f"stages: until_step {ends[-1]} must be less than training.max_steps {max_steps}"
            )
        if any((stage.seq_len or 0) > self.data.seq_len for stage in self.stages):
            raise ValueError(
                f"stages: no seq_len may exceed data.seq_len {self.data.seq_len}, for which the "
                "model has positions"
            )
        return self

    def batch_shapes(self) -> list[BatchShape]:
        """The sizes of steps in each stage. The last one has no end."""
        final = StageConfig(until_step=sys.maxsize)
        starts = [0, *(stage.until_step for stage in self.stages)]
        shapes = []
        for start, stage in zip(starts, [*self.stages, final], strict=True):
            seq_len = stage.seq_len or self.data.seq_len
            shapes.append(
                BatchShape(
                    first_step=start,
                    seq_len=seq_len,
                    global_batch_size=stage.global_batch_size or self.batch.global_batch_size,
                    # micro_batch_size is what fits at data.seq_len; of shorter rows, more fit.
                    max_micro_batch_size=self.batch.micro_batch_size * self.data.seq_len // seq_len,
                )
            )
        return shapes
