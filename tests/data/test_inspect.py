"""inspect_data prints and hashes the data that a run sees."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from kantai.config.loading import load_config, save_config
from kantai.data.inspect import describe_shards
from kantai.data.shards import open_shards
from kantai.data.tokenizer import load_tokenizer
from kantai.errors import UserError
from tests.helpers.commands import CONFIG, script
from tests.helpers.tokenizer_kinds import loaded


@pytest.fixture
def settings(many_shards_dir: Path, tokenizer_dir: Path) -> list[str]:
    sizes = ["--data.seq_len=32", "--batch.global_batch_size=10", "--optimizer.warmup_steps=1"]
    return [
        "--config",
        str(CONFIG),
        f"--data.shards={many_shards_dir}",
        f"--data.tokenizer={tokenizer_dir}",
        *sizes,
    ]


def inspect_data(*arguments: object) -> str:
    done = script("inspect_data", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_inspect_describes_shards(many_shards_dir: Path, tokenizer_dir: Path) -> None:
    train = open_shards(many_shards_dir).splits["train"]
    output = inspect_data("--shards", many_shards_dir, "--tokenizer", tokenizer_dir)
    assert (
        f"train: {train.documents.sum():,} documents, {train.tokens.sum():,} tokens, {len(train)} "
        "shards" in output
    )
    longest = max(int(shard.lengths.max()) for shard in train)
    assert (
        f"mean {train.tokens.sum() / train.documents.sum():,.1f}; 0 %: " in output
        and f"100 %: {longest:,}" in output
    )
    lengths = np.concatenate([shard.lengths for shard in train])
    shares = [
        np.clip(lengths - seq_len + 1, 0, None).sum() / lengths.sum() for seq_len in (128, 512)
    ]
    assert (
        f"tokens left out   {shares[0]:.1%} at seq_len 128, {shares[1]:.1%} at seq_len 512: "
        in output
        and shares[0] > 0.1
    )
    assert "'</s>' " in output and "' the' " in output
    # Without a tokenizer, inspect_data prints ids only.
    assert "' the' " not in inspect_data("--shards", many_shards_dir)


def test_inspect_decodes_step(
    settings: list[str], many_shards_dir: Path, tokenizer_dir: Path
) -> None:
    """Each row is a piece of the split once the true words replace the masks."""
    vocabulary = load_tokenizer(tokenizer_dir)
    output = inspect_data(
        *settings,
        "--masking.mask_share=1.0",
        "--masking.random_share=0.0",
        "--step",
        3,
        "--world_size",
        3,
        "--rank",
        2,
        "--rows",
        9,
    )
    assert "step 3: 10 sequences a step = 3 ranks x 1 micro-steps x 4, 2 of them empty" in output

    rows = output.split("\nrow ")[1:]
    assert [row.split(":")[0] for row in rows] == ["8", "9"]
    split = "".join(
        vocabulary.tokenizer.decode(shard.tokens, skip_special_tokens=False)
        for shard in open_shards(many_shards_dir).splits["train"]
    )
    for row in rows:
        text = row.split("\n", 1)[1].strip("\n").removeprefix("<s>")
        parts = text.split("[<mask>|")
        assert len(parts) > 2
        true = parts[0] + "".join("".join(part.split("]", 1)) for part in parts[1:])
        assert true[:12] in split


@pytest.mark.slow
def test_hash_depends_on_data_only(settings: list[str]) -> None:
    def hashed(first: int, stop: int, *changes: str) -> str:
        output = inspect_data(*settings, *changes, "--hash", first, stop)
        assert output.startswith(f"steps {first} to {stop - 1}: ")
        return output.split()[-1]

    found = hashed(5, 25)
    assert (
        found == hashed(5, 25, "--world_size=7", "--batch.micro_batch_size=3") and len(found) == 64
    )
    others = [
        ("--seed=1",),
        ("--masking.ratio=0.2",),
        ("--data.shuffle_window=2",),
        ("--data.packing=padded",),
        ("--batch.global_batch_size=11",),
    ]
    assert len(
        {found, hashed(5, 24), hashed(6, 25), *(hashed(5, 25, *change) for change in others)}
    ) == 3 + len(others)


@pytest.mark.slow
def test_inspect_follows_skipped_data(settings: list[str], tmp_path: Path) -> None:
    run = [*settings, f"--run_dir={tmp_path}"]
    without_skip = {
        query: inspect_data(*run, *query)
        for query in (("--step", 9), ("--hash", 9, 12), ("--step", 3))
    }
    save_config(load_config(settings[1], run[2:]), tmp_path / "config.yaml")
    (tmp_path / "skipped_data.jsonl").write_text('{"from_step": 4, "first": 4, "stop": 8}\n')
    output = inspect_data(*run, "--step", 5)
    assert "its data is that of step 9 by the config: the run skipped" in output
    assert output.split("\nrow ")[1:] == without_skip["--step", 9].split("\nrow ")[1:]
    assert (
        inspect_data(*run, "--hash", 5, 8).split()[-1] == without_skip["--hash", 9, 12].split()[-1]
    )
    assert inspect_data(*run, "--step", 3) == without_skip["--step", 3]

    done = script("inspect_data", *run, "--seed=77", "--step", 5)
    assert (
        done.returncode == 2
        and "belongs to a run of another config: seed was 0 and is 77" in done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --shards or --config"),
        (["--shards", "x", "--config", "y"], "give either --shards or --config"),
        (["--shards", "x", "--seed=1"], "and not --seed=1"),
        (["--shards", "nowhere"], "no shards at nowhere"),
        (["--shards", "none://x"], "cannot read none://x"),
        (["--config", CONFIG, "--rank", "1"], "ranks from 0 to one less than --world_size"),
        (["--config", CONFIG, "--step", "-1"], "steps are counted from 0"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    done = script("inspect_data", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_share_that_is_not_shown_is_described(
    many_shards_dir: Path, shards_dir: Path, tokenizer_dir: Path
) -> None:
    tokens = open_shards(many_shards_dir).splits["train"].tokens
    said = inspect_data("--shards", many_shards_dir)
    shares = []
    for seq_len in (128, 512):
        rows = -(-tokens // (seq_len - 1))
        shares.append((rows * (seq_len - 1) - tokens).sum() / tokens.sum())
    twice = f"tokens twice      {shares[0]:.1%} at seq_len 128, {shares[1]:.1%} at seq_len 512"
    assert twice in said and shares[1] > 0.02
    assert "tokens not shown  0.0% at seq_len 128, 0.0% at seq_len 512" in said

    longer = int(tokens.min()) + 2  # than the shortest shard
    where = ["--config", CONFIG, f"--data.tokenizer={tokenizer_dir}", f"--data.seq_len={longer}"]
    short = tokens[tokens < longer - 1]
    said = inspect_data(*where, f"--data.shards={many_shards_dir}")
    share = short.sum() / tokens.sum()
    assert 0.001 < share < 0.1
    assert f"tokens not shown  {share:.1%} at seq_len {longer}" in said
    assert "tokens not shown  0.0%" in inspect_data(*where, f"--data.shards={shards_dir}")


def test_start_of_a_run_says_what_is_not_shown(
    many_shards_dir: Path, shards_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    tokens = open_shards(many_shards_dir).splits["train"].tokens
    longer = int(tokens.min()) + 2  # than the shortest shard
    share = tokens[tokens < longer - 1].sum() / tokens.sum()

    def checked(shards: Path, *arguments: str) -> str:
        where = [f"--data.tokenizer={tokenizer_dir}", f"--run_dir={tmp_path / 'run'}", *arguments]
        where.append(f"--data.shards={shards}")
        done = script("pretrain", "--config", CONFIG, "--check", "--training.max_steps=300", *where)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = checked(many_shards_dir, f"--data.seq_len={longer}")
    assert f"an epoch does not show {share:.1%} of the training tokens, and shows" in said
    assert f"as {len(tokens)} shards are short: tokenize the corpus again to join them" in said
    assert "an epoch" not in checked(shards_dir, "--data.seq_len=32")
    padded = checked(shards_dir, "--data.packing=padded", "--data.seq_len=64")
    assert "of the training tokens: data.packing padded leaves out what is beyond 64" in padded
    assert not (tmp_path / "run").exists()


def test_tokens_are_not_read_with_another_tokenizer(
    tmp_path: Path, shards_dir: Path, tokenizer_dir: Path
) -> None:
    shards = open_shards(shards_dir)
    vocabulary = load_tokenizer(tokenizer_dir)
    assert any("frequent tokens" in line for line in describe_shards(shards, vocabulary))
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.add_tokens(["<url>"])
    with pytest.raises(UserError, match="made with another tokenizer"):
        list(describe_shards(shards, loaded(tokenizer, tmp_path)))
