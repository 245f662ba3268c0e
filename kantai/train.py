"""The loop: batches in, updates done, metrics and checkpoints out."""

import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from kantai.batches import Batches, Stage
from kantai.checkpoint import begin, publish, verify
from kantai.cluster import Place, StopSignal
from kantai.config import BatchPlan
from kantai.data import Prefetcher
from kantai.engine import Engine, Outcome
from kantai.evaluate import fill_masks, held_out_score
from kantai.metrics import Metrics, Progress, Speed, peak_memory_gib
from kantai.model import MicroBatch, build_model
from kantai.optim import learning_rate
from kantai.rundir import RunDir

_PREFETCHED = 4  # micro-batches that a worker makes ahead


def train(run_dir: RunDir, place: Place) -> None:
    """Train from the newest valid checkpoint, or from scratch, to the last update or a stop signal."""
    config, data = run_dir.config, run_dir.data
    stop = StopSignal()
    engine = Engine(config, place, build_model(config, data.vocabulary))
    batches = data.training_batches(place.world_size)
    run = Run(run_dir, engine, batches)
    first_update = run.resume()
    prefetcher = Prefetcher(data, batches, place.rank, first_update)
    on_gpu = engine.device.type == "cuda"
    for update, micro_batches, waited_seconds in stream(
        batches, place.rank, first_update, data.total_updates, config.data.workers, pin_memory=on_gpu
    ):
        prefetcher.advance(update)
        run.update(update, micro_batches, waited_seconds)
        done = update + 1
        is_last = done == data.total_updates
        must_stop = engine.any_rank(stop.received is not None)
        if is_last or done % config.evaluation.every_updates == 0:
            run.evaluate(done)
        if is_last or must_stop or done % config.checkpoint.every_updates == 0:
            run.save(done)
        if must_stop and not is_last:
            run.progress.say(f"asked to stop: saved update {done} of {data.total_updates}; the same command goes on from there")
            break
    run.close()


class Run:
    """What rank 0 writes down, and every rank's part in saving and evaluating."""

    def __init__(self, run_dir: RunDir, engine: Engine, batches: Batches) -> None:
        self.dir, self.engine, self.config, self.data, self.batches = run_dir, engine, run_dir.config, run_dir.data, batches
        self.is_main = engine.place.is_main
        self.speed = Speed(engine.matmul_flops_per_second())

    def resume(self) -> int:
        """Take up the newest valid checkpoint and open the records. Returns the updates done so far."""
        if self.is_main:
            self.dir.create()
        done = self.engine.from_main(self.dir.newest(set_aside=True) if self.is_main else 0)
        if done:
            self.engine.load_state(self.dir.store.path(done), done)
        self.metrics = Metrics(self.dir.path, first_update=done + 1) if self.is_main else None
        self.progress = Progress(done, self.data.total_updates, show=self.is_main)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.raw_model.parameters())
        self.progress.say(f"model: {parameters:,} parameters; {self.data.total_updates} updates, {done} done")
        self.stage: Stage | None = None
        return done

    def update(self, update: int, micro_batches: list[MicroBatch], waited_seconds: float) -> None:
        """Do one update and write down what happened."""
        if self.stage is not (stage := self.batches.stage(update)):
            self.stage = stage
            self.progress.say(f"from update {update} on: {stage.plan}, of up to {stage.sequences.seq_len} tokens")
        rate = learning_rate(self.config.optimizer, update, self.data.total_updates)
        start = time.perf_counter()
        outcome = self.engine.update(update, micro_batches, rate)
        self.speed.add(time.perf_counter() - start + waited_seconds, outcome.tokens, outcome.flops)
        if self.metrics is not None:
            self.metrics.write(
                update + 1, {**_train_record(outcome, rate), **self.speed.record(), "speed/data_wait_seconds": waited_seconds}
            )
        self.progress.update(update + 1, outcome.loss, self.speed.record()["speed/tokens_per_second"], self.speed.seconds_per_update)

    def evaluate(self, done: int) -> None:
        """Score the held-out split and fill in the prompts, on all ranks together."""
        engine, micro, world = self.engine, self.config.batch.micro_batch_size, self.engine.place.world_size
        batches, steps = self.data.held_out_batches(BatchPlan(micro * world, micro, world))
        score = held_out_score(
            engine.model, batches, steps, rank=engine.place.rank, device=engine.device, sum_over_ranks=engine.sum_over_ranks
        )
        prompts = self.data.prompts()
        filled = fill_masks(engine.model, self.data.vocabulary, prompts, self.config.data.seq_len)
        self.progress.say(
            f"update {done}: held-out loss {score.loss:.3f} (unigram entropy {self.data.unigram_entropy:.3f}), "
            f"accuracy {score.accuracy:.1%}, perplexity {score.perplexity:,.1f}"
        )
        if self.metrics is not None:
            self.metrics.write(
                done, {**score.record(), "held_out/unigram_entropy": self.data.unigram_entropy, "memory/peak_gib": self.peak_memory_gib()}
            )
            lines = (f"{prompt}: {', '.join(word for word, _ in words)}" for prompt, words in zip(prompts, filled, strict=True))
            self.metrics.write_text(done, "fill_mask", "\n\n".join(line.replace("<", "&lt;") for line in lines))

    def save(self, done: int) -> None:
        """Publish a checkpoint, then remove the oldest."""
        target = self.dir.store.path(done)
        folder = self.engine.from_main(begin(target) if self.is_main else target)
        files = self.engine.save_state(folder)
        if self.is_main:
            publish(folder, target, files, kind="checkpoint", update=done, lineage=self.dir.lineage())
            verify(target)
            self.dir.store.prune(self.config.checkpoint.keep)
        self.engine.wait_for_all()

    def peak_memory_gib(self) -> float:
        """Most memory held on this rank's device, in GiB."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.engine.device.type == "cuda" else peak_memory_gib()

    def close(self) -> None:
        """Flush the records and leave the other ranks."""
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()
        self.engine.close()


def stream(
    batches: Batches, rank: int, first_update: int, total_updates: int, workers: int, *, pin_memory: bool = False
) -> Iterator[tuple[int, list[MicroBatch], float]]:
    """Yield (update, this rank's micro-batches, seconds waited for them) from ``first_update`` on, made by any number of workers."""

    def micro_steps(update: int) -> range:
        return range(batches.stage(update).plan.gradient_accumulation_steps)

    sampler = ((update, micro_step) for update in range(first_update, total_updates) for micro_step in micro_steps(update))
    loader = DataLoader(
        _MicroBatches(batches, rank),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        # Forked workers share the mapped shards; any other start would pickle them, whole.
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=_PREFETCHED if workers else None,
        pin_memory=pin_memory,
    )
    micro_batches = iter(loader)
    for update in range(first_update, total_updates):
        start = time.perf_counter()
        found = [next(micro_batches) for _ in micro_steps(update)]
        yield update, found, time.perf_counter() - start


class _MicroBatches(Dataset[MicroBatch]):
    """A rank's micro-batches by update and micro-step, so that a data loader's workers can make any of them."""

    def __init__(self, batches: Batches, rank: int) -> None:
        self.batches, self.rank = batches, rank

    def __getitem__(self, place: tuple[int, int]) -> MicroBatch:
        return MicroBatch(self.batches.micro_batch(*place, self.rank))


def _train_record(outcome: Outcome, rate: float) -> dict[str, float]:
    return {
        "train/loss": outcome.loss,
        "train/accuracy": outcome.accuracy,
        "train/perplexity": outcome.perplexity,
        "train/learning_rate": rate,
        "train/grad_norm": outcome.grad_norm,
    }
