"""Tests of the templates in slurm/ on a real SLURM.

Each node has its own network and processes, and tests can kill or unplug it. Every job checks two
traps: a rendezvous at 127.0.0.1 reaches no other node, and an independent launcher on every node
trains a world of its own.
"""

import json
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kantai.checkpoint.store import CheckpointStore
from kantai.storage.atomic import verify
from tests.helpers.commands import ROOT, TINY, pretrain, script
from tests.helpers.runs import assert_same_run, metrics
from tests.helpers.slurm_cluster import Cluster, running_cluster

pytestmark = pytest.mark.slurm

NO_DROPOUT = ["--model.hidden_dropout_prob=0", "--model.attention_probs_dropout_prob=0"]
PRETRAIN = ("slurm/pretrain.sbatch", "configs/quickstart.yaml")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm"), nodes=5) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def data_arguments(shards_dir: Path, tokenizer_dir: Path) -> list[str]:
    return [*TINY, f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}"]


@contextmanager
def frozen(cluster: Cluster, job: str, run: Path, steps: int) -> Iterator[None]:
    """Stop rank 0 once the run has logged some steps, so that all ranks wait within the block.

    No machine is then too fast for the test.
    """
    cluster.wait_until(lambda: steps_logged(run) >= steps, job=job, poll_seconds=0.005)
    found = [process for process in rank_0(run) if process.status() != psutil.STATUS_STOPPED]
    for process in found:
        process.send_signal(signal.SIGSTOP)
    cluster.wait_until(
        lambda: all(process.status() == psutil.STATUS_STOPPED for process in found), job=job
    )
    yield
    thaw(found)


def thaw(found: list[psutil.Process]) -> None:
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


def processes(*words: str) -> list[psutil.Process]:
    """Return the Python processes of all nodes that have these words in their command line."""
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if (process.info["name"] or "").startswith("python")
        and set(words) <= set(process.info["cmdline"] or [])
    ]


def rank_0(run: Path) -> list[psutil.Process]:
    """Return the processes of rank 0 of a run: one, and stale ones of superseded starts."""
    found = []
    for process in processes(f"--run_dir={run}"):
        with suppress(psutil.Error):  # the process may have ended meanwhile
            if process.environ().get("RANK") == "0":
                found.append(process)
    return found


def file_states(run: Path) -> dict[Path, tuple[int, int]]:
    """Return size and time of every file of a run but TensorBoard's.

    TensorBoard's writer may still write queued events into the file of its own start.
    """
    found = (path for path in run.rglob("*") if "tensorboard" not in path.parts)
    return {path: ((status := path.stat()).st_size, status.st_mtime_ns) for path in found}


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"train/loss"') if path.exists() else 0


def report_times(output: str, what: str) -> list[float]:
    """Return the whole Unix seconds of the batch script's reports that end in ``what``."""
    times = re.findall(rf"^\[(.*?)\] step \d+ of \d+; {what}", output, re.MULTILINE)
    return [datetime.fromisoformat(at).timestamp() for at in times]


def test_job_excludes_bad_nodes_and_matches_one_process(
    cluster: Cluster, data_arguments: list[str], tmp_path: Path
) -> None:
    """Three of four nodes are bad, and the job submits itself again without them.

    n2 has a full disk and another folder of runs, n3 has a wrong clock, n4 lacks a GPU. The second
    job trains four DeepSpeed ranks. DeepSpeed's own multi-node launcher would train one world on
    each node and exit with 0.
    """
    (faketime,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    nvidia_smi = cluster.folder / "bin" / "nvidia-smi"
    nvidia_smi.parent.mkdir()
    inside = cluster.folder / "inside"
    good = "580.1, H200, 143771, 1, 0"
    bad = "580.1, A100, 81920, 9000, 0"
    # Only nvidia-smi is simulated here.
    nvidia_smi.write_text(
        f"#!/bin/sh\n[ $(hostname) = n4 ] && echo '{bad}' || printf '%s\\n' '{good}' '{good}'\n"
    )
    inside.write_text(
        "#!/bin/sh\n"
        f"[ $(hostname) != n3 ] || export LD_PRELOAD={faketime} FAKETIME=-1h\n"
        'exec "$@"\n'
    )
    for program in (nvidia_smi, inside):
        program.chmod(0o755)
    site = (
        f"PATH={nvidia_smi.parent}:$PATH CONTAINER=({inside}) PREFLIGHT=yes "
        "MIN_NODES=2 RANKS_PER_NODE=2"
    )

    how = [*data_arguments, *NO_DROPOUT, "--training.max_steps=6"]
    for folder, size in ((cluster.scratch, "1m"), (tmp_path, "1g")):
        cluster.admin("onnode", "n2", "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        job = cluster.sbatch(
            "--nodes=4", *PRETRAIN, "zero2", *how, f"--run_dir={tmp_path / 'run'}", site=site
        )
        assert cluster.wait(job)["JobState"] == "FAILED"  # the second job continues
    finally:
        for folder in (cluster.scratch, tmp_path):
            cluster.admin("onnode", "n2", "umount", folder)
    printed = cluster.output(job)
    verdicts = dict(re.findall(r"^(n\d) .*GiB/s  (.*)$", printed, re.MULTILINE))
    (seconds,) = re.findall("^clock is (.*) s off$", verdicts.pop("n3"))
    assert float(seconds) == pytest.approx(-3600, abs=60), printed
    assert verdicts.pop("n2") == (
        f"{cluster.scratch}: No space left on device; {tmp_path} is a different folder on this node"
    ), printed
    lacks = (
        "9000 MiB of GPU 0 are in use; 1 of 2 GPUs; GPU A100 of 81920 MiB, not H200 of 143771 MiB"
    )
    assert verdicts == {"n1": "good", "n4": lacks}, printed
    assert (cluster.logs / f"pretrain-{job}" / "bad_nodes").read_text() == "n2\nn3\nn4\n"

    (job,) = re.findall(r"Submitted batch job (\d+)", printed)
    pretrain(None, *how, f"--run_dir={tmp_path / 'one'}")
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.all_logs()
    logs = cluster.logs / f"pretrain-{job}" / "attempt-0.0"
    assert sorted(path.name for path in logs.iterdir()) == [
        "n1.log",
        "n5.log",
        *(f"rank-0000{rank}.log" for rank in range(4)),
    ]
    assert "4 ranks x" in (logs / "rank-00000.log").read_text()
    assert_same_run(tmp_path / "run", tmp_path / "one")


def test_timed_out_and_preempted_job_gives_same_bits(
    cluster: Cluster, data_arguments: list[str], tmp_path: Path
) -> None:
    steps = 120  # more steps than a fast machine does before it is frozen
    run = tmp_path / "run"
    how = [*data_arguments, f"--training.max_steps={steps}"]
    pretrain("cpu", *how, f"--run_dir={tmp_path / 'straight'}")
    start = time.time()
    # SLURM checks time limits every 30 seconds and may signal that much earlier: 10 to 40 seconds
    # after the start. A signal that comes with the start may be lost.
    options = (
        "--nodes=3",
        "--time=1",
        "--signal=B:USR1@20",
        "--gpus=6",
        "--export=KANTAI_SITE,SLURM_TIME_FORMAT=relative",
    )
    # On a slow machine, ranks that knew the real end time would stop before the signal.
    # A start of less than a minute may not pay for itself; the job is not to give up.
    site = "RANKS_PER_NODE=1 USE_NODES=2 SLURM_JOB_END_TIME=9999999999 MAX_FRUITLESS=9"
    job = cluster.sbatch(*options, *PRETRAIN, "cpu", *how, f"--run_dir={run}", site=site)

    def restarts(at_least: int) -> bool:
        return int(cluster.job(job)["Restarts"]) >= at_least

    for number in (1, 2):
        # The run stays frozen until SLURM sends the signal before the limit.
        with frozen(cluster, job, run, steps_logged(run) + 1):
            cluster.wait_until(
                lambda count=number: cluster.output(job).count("asked to stop: passing") >= count,
                job=job,
            )
        cluster.wait_until(lambda count=number: restarts(count), job=job)
        assert not list(cluster.scratch.glob("kantai-*"))
    # A job of higher priority wants the nodes: SLURM sends SIGTERM to all ranks.
    with frozen(cluster, job, run, steps_logged(run) + 1):
        cluster.run(
            "sbatch",
            "--partition=urgent",
            "--nodes=5",
            "--exclusive",
            "--output=/dev/null",
            "--wrap=true",
        )
        cluster.wait_until(lambda: cluster.job(job)["PreemptTime"] != "None", job=job)
    cluster.wait_until(lambda: restarts(3), job=job)
    cluster.wait(job, {"PENDING", "RUNNING"})
    # A busy machine may need several minutes more.
    cluster.run("scontrol", "update", f"jobid={job}", "timelimit=10")
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.all_logs()
    for name in ("train/loss", "train/grad_norm", "held_out/loss"):
        assert metrics(run, name) == metrics(tmp_path / "straight", name)
    shown = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("train/loss")] == [
        (step, pytest.approx(loss)) for step, loss in enumerate(metrics(run, "train/loss"), 1)
    ]
    allocated = sum(metrics(run, "speed/step_seconds")) / metrics(run, "speed/goodput")[-1]
    assert allocated < time.time() - start

    # Allocated time begins with each start of the job, before the batch script starts its
    # processes. It ends with the start's last record, or at the launchers' end where the start
    # could not save that record.
    began = [json.loads(line)["began"] for line in (run / "starts.jsonl").read_text().splitlines()]
    assert all(
        since <= at
        for since, at in zip(began, report_times(cluster.output(job), "nodes"), strict=True)
    )
    kept = [json.loads(line)["time"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    launchers_ended = report_times(cluster.output(job), "the launchers ended")
    least = most = 0.0
    for since, until in pairwise([*began, time.time()]):
        least += max(since, *(at for at in kept if at <= until)) - since
        most += min(until, *(at + 1 for at in launchers_ended if since <= at)) - since
    assert least - 1 <= allocated <= most + 1

    ours = verify(CheckpointStore(run).path(steps))
    straight = verify(CheckpointStore(tmp_path / "straight").path(steps))
    assert ours["files"] == straight["files"]


def test_tokenization_array_survives_two_killed_parts(
    cluster: Cluster, corpus_file: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """The array submits one merge, which waits for the second starts of the killed parts.

    The shards equal those of one process. Part 0 submits the merge. Part 2 has the job id of the
    array: a requeue by that id would start the whole array again.
    """
    text = corpus_file.read_text().split("\n\n")
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("\n\n".join(text[number::4]))
    how = [
        "--input",
        tmp_path / "*.txt",
        "--tokenizer",
        tokenizer_dir,
        "--document",
        "paragraph",
        "--held_out",
        0.05,
    ]
    job = cluster.sbatch(
        "--array=0-2",
        "--cpus-per-task=1",
        "slurm/tokenize.sbatch",
        *how,
        "--output",
        tmp_path / "array",
    )
    killed: set[int] = set()

    def kill_parts() -> bool:
        running = [
            (process.info["cmdline"], process)
            for process in processes("--part", str(tmp_path / "array"))
        ]
        parts = [(int(line[line.index("--part") + 1]), process) for line, process in running]
        doomed = [(part, process) for part, process in parts if part in {0, 2} - killed]
        for part, process in doomed:
            process.kill()
            killed.add(part)
        return killed == {0, 2}

    cluster.wait_until(kill_parts, poll_seconds=0.005)
    queue = ("squeue", "--noheader", "--states=all", "--name=tokenize-merge", "--format=%A")
    cluster.wait_until(lambda: bool(cluster.run(*queue)))
    merge = cluster.run(*queue).strip()  # a merge that does not wait for all parts fails
    script("tokenize_corpus", *how, "--output", tmp_path / "one")
    done = cluster.wait(merge)
    assert done["JobState"] == "COMPLETED", cluster.all_logs()
    assert [cluster.job(f"{job}_{part}")["Restarts"] for part in range(3)] == ["1", "0", "1"]

    ours = verify(tmp_path / "array")
    one = verify(tmp_path / "one")
    assert ours["splits"] == one["splits"]
    assert ours["files"] == one["files"]


def test_job_survives_killed_and_unplugged_nodes(data_arguments: list[str], tmp_path: Path) -> None:
    """With --nodes=1-2 the job continues on one node after the other is killed.

    Then that node is unplugged. Its ranks keep training while the job's third start runs, and must
    not write.
    """
    run = tmp_path / "run"
    length = ["--training.max_steps=300", "--checkpoint.every_steps=10"]
    how = [*data_arguments, *NO_DROPOUT, *length]
    with running_cluster(tmp_path / "slurm", nodes=3) as cluster:

        def runs_on(nodes: str) -> bool:
            now = cluster.job(job)
            return now["JobState"] == "RUNNING" and now["NodeList"] == nodes

        cluster.admin("killnode", "n3")
        cluster.set_down("n3")
        job = cluster.sbatch(
            "--nodes=1-2", *PRETRAIN, "cpu", *how, f"--run_dir={run}", site="RANKS_PER_NODE=1"
        )
        with frozen(cluster, job, run, 25):
            assert runs_on("n[1-2]")
            cluster.admin("killnode", "n2")
            cluster.set_down("n2")
            cluster.wait_until(lambda: runs_on("n1"), job=job)
        with frozen(cluster, job, run, steps_logged(run) + 25):
            stale = rank_0(run)
            cluster.admin("startnode", "n3")
            cluster.admin("unplug", "n1")
            cluster.set_down("n1")
            cluster.wait_until(lambda: runs_on("n3"), job=job)
            with frozen(cluster, job, run, steps_logged(run) + 1):
                before = file_states(run)
                thaw(stale)
                cluster.wait_until(
                    lambda: not any(process.is_running() for process in stale), job=job
                )
                assert file_states(run) == before
        assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.all_logs()
    pretrain(None, *how, f"--run_dir={tmp_path / 'one'}")
    assert metrics(run, "train/loss") == pytest.approx(
        metrics(tmp_path / "one", "train/loss"), abs=1e-3
    )
    for step in CheckpointStore(run).steps():
        verify(CheckpointStore(run).path(step))


@pytest.fixture
def fake_launcher_site(tmp_path: Path) -> str:
    """Return a site whose ``accelerate`` prints its arguments, and fails on node n7."""
    program = tmp_path / "bin" / "accelerate"
    program.parent.mkdir()
    program.write_text(
        """#!/bin/sh
        echo $(hostname) $*
        [ $(hostname) != n7 ] || {
            # Its failure ends the others.
            until [ $(cat $ATTEMPT_LOGS/*.log | wc -l) = 64 ]; do sleep 0.2; done
            echo 'RuntimeError: no such luck'
            exit 3
        }
        """
    )
    program.chmod(0o755)
    return f"PATH={program.parent}:$PATH RANKS_PER_NODE=2 MAX_FRUITLESS=1 SLURM_WAIT=300"


def test_64_nodes_get_ranks_and_fruitless_job_gives_up(
    fake_launcher_site: str, data_arguments: list[str], tmp_path: Path
) -> None:
    with running_cluster(tmp_path / "slurm", nodes=64) as cluster:
        job = cluster.sbatch(
            "--nodes=64",
            *PRETRAIN,
            "zero2",
            *data_arguments,
            f"--run_dir={tmp_path / 'run'}",
            site=fake_launcher_site,
        )
        ended = cluster.wait(job)
        assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1")
        printed = cluster.output(job)
        assert printed.count("RuntimeError: no such luck") == 2
        assert "gave up: 2 starts without a checkpoint after step 0" in printed
        ports = set()
        for attempt in (0, 1):
            logs = cluster.logs / f"pretrain-{job}" / f"attempt-0.{attempt}"
            assert (
                "n7.log:\nRuntimeError: no such luck" in (logs / "00-first-error.txt").read_text()
            )
            calls = {
                words[0]: words
                for path in logs.glob("n*.log")
                if (words := path.read_text().split())
            }
            options = [
                {words[i]: words[i + 1] for i in range(2, len(words) - 1)}
                for words in calls.values()
            ]
            assert {
                node: int(option["--machine_rank"])
                for node, option in zip(calls, options, strict=True)
            } == {f"n{number + 1}": number for number in range(64)}
            assert {
                (option["--num_machines"], option["--num_processes"]) for option in options
            } == {("64", "128")}
            ((address, port),) = {
                (option["--main_process_ip"], option["--main_process_port"]) for option in options
            }
            assert address == "n1"
            ports.add(port)
        assert len(ports) == 2
        assert not list(cluster.scratch.glob("kantai-*"))


def test_fruitless_chain_and_bad_input_are_not_retried(
    cluster: Cluster, fake_launcher_site: str, data_arguments: list[str], tmp_path: Path
) -> None:
    how = (*PRETRAIN, "cpu", *data_arguments, f"--run_dir={tmp_path / 'run'}")
    chain = cluster.sbatch("--no-requeue", "--array=1-3%1", *how, site=fake_launcher_site)
    wrong = cluster.sbatch(*how, "--data.seqlen=64", site=fake_launcher_site)
    assert cluster.wait(wrong)["ExitCode"] == "2:0"
    assert "unknown key 'data.seqlen'" in cluster.output(wrong)
    links = [cluster.wait(f"{chain}_{number}") for number in (1, 2, 3)]
    assert [link["ExitCode"] for link in links] == ["75:0", "1:0", "1:0"]
    assert all(link["Restarts"] == "0" for link in links)
    assert all(before["EndTime"] <= after["StartTime"] for before, after in pairwise(links))


def test_chain_excludes_bad_node_and_ends_failed_links(
    cluster: Cluster, fake_launcher_site: str, data_arguments: list[str], tmp_path: Path
) -> None:
    """Each link of the chain fails in its own way.

    The node of the first link has no GPUs, the programs of the second print nothing, and the third
    cannot write its count of starts.
    """
    breakages = """
        case $SLURM_ARRAY_TASK_ID in
            1) PREFLIGHT=yes RANKS_PER_NODE='' ;;
            2) CONTAINER=(true) ;;
            3) ln -s /dev/full $LOGS/pretrain-$SLURM_ARRAY_JOB_ID/tries.new ;;
        esac"""
    options = ("--no-requeue", "--array=1-3%1", "--exclude=n5")
    chain = cluster.sbatch(
        *options,
        *PRETRAIN,
        "cpu",
        *data_arguments,
        f"--run_dir={tmp_path / 'run'}",
        site=fake_launcher_site + breakages,
    )
    links = [cluster.wait(f"{chain}_{number}") for number in (1, 2, 3)]
    assert [link["ExitCode"] for link in links] == ["75:0", "75:0", "1:0"], cluster.all_logs()
    printed = [cluster.output(link["JobId"]) for link in links]
    assert "0 of 2 GPUs" in printed[0]
    assert "could not look how far the run is" in printed[1]
    assert "cannot write" in printed[2]
    for link in links[1:]:
        assert set(cluster.run("scontrol", "show", "hostnames", link["ExcNodeList"]).split()) == {
            links[0]["NodeList"],
            "n5",
        }


def test_srun_of_several_programs_is_refused(
    cluster: Cluster, data_arguments: list[str], tmp_path: Path
) -> None:
    """Two tasks would be two worlds of one; one task, and a batch script, are one process."""
    run = tmp_path / "run"
    program = [sys.executable, ROOT / "scripts/pretrain.py", "--config", ROOT / PRETRAIN[1]]
    text = shlex.join([*map(str, program), *data_arguments, f"--run_dir={run}", "--check"])
    told = "they would train apart and supersede each other"

    def ended(command: str) -> str:
        return cluster.run("bash", "-c", f"PYTHONPATH={ROOT} {command} 2>&1; echo code $?")

    printed = ended(f"srun -N2 -n2 {text}")
    assert told in printed and "code 0" not in printed
    assert told in ended(f"srun -N2 -n2 env {text}")
    launched = "accelerate launch --config_file configs/accelerate/cpu.yaml --num_processes 2"
    bin_dir = Path(sys.executable).parent
    alone = text.removeprefix(f"{sys.executable} ")
    assert told in ended(f"srun -N2 -n2 {bin_dir}/{launched} {alone}")
    assert not run.exists()
    assert "0 of 2000 steps done\ncode 0" in ended(f"srun -N1 -n1 {text}")
    job = cluster.run(
        "sbatch",
        "--parsable",
        "--wait",
        "--ntasks=2",
        f"--output={tmp_path}/batch.out",
        f"--wrap=PYTHONPATH={ROOT} {text}",
    )
    assert cluster.job(job.strip())["JobState"] == "COMPLETED"
    assert "0 of 2000 steps done" in (tmp_path / "batch.out").read_text()


def test_superseded_job_ends_for_good(
    cluster: Cluster, data_arguments: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    how = [*data_arguments, "--training.max_steps=1000000", f"--run_dir={run}"]
    chain = ("--nodes=1", "--no-requeue", "--array=1-3%1")
    first = cluster.sbatch(*chain, *PRETRAIN, "cpu", *how, site="RANKS_PER_NODE=1")
    cluster.wait_until(lambda: steps_logged(run) > 0, job=first)
    second = cluster.sbatch("--nodes=1", *PRETRAIN, "cpu", *how, site="RANKS_PER_NODE=1")
    ended = cluster.wait(f"{first}_1")
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0"), cluster.all_logs()
    assert "has started this run since, and goes on with it" in cluster.output(ended["JobId"])
    for link in (2, 3):
        cluster.wait_until(lambda link=link: f"{first}_{link} " not in queue(cluster), job=first)
    third = cluster.sbatch("--nodes=1", *PRETRAIN, "cpu", *how, site="RANKS_PER_NODE=1")
    ended = cluster.wait(second)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), cluster.all_logs()
    assert cluster.job(third)["JobState"] == "RUNNING"
    cluster.run("scancel", third)
    cluster.wait(third)


def queue(cluster: Cluster) -> str:
    """Return the ids of waiting and running jobs, each with a space behind it."""
    return cluster.run("squeue", "--noheader", "--array", "--format=%i ")


def test_time_limit_that_pays_for_no_start_ends_job(
    cluster: Cluster, data_arguments: list[str], tmp_path: Path
) -> None:
    """Each start does some steps, and takes longer to begin than it trains."""
    run = tmp_path / "run"
    config = tmp_path / "mine.yaml"
    config.write_text((ROOT / PRETRAIN[1]).read_text())
    job = cluster.sbatch(
        "--nodes=1",
        "--hold",
        PRETRAIN[0],
        config,
        "cpu",
        *data_arguments,
        f"--run_dir={run}",
        "--training.max_steps=1000000",
        site="RANKS_PER_NODE=1; SLURM_JOB_END_TIME=$(($(date +%s) + 1))",  # one step each
    )
    time.sleep(1.1)  # file times and SLURM's are whole seconds
    config.write_text(config.read_text() + "failures: {hang_seconds: 900}\n")
    cluster.run("scontrol", "release", job)
    ended = cluster.wait(job)
    printed = cluster.output(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2"), cluster.all_logs()
    assert printed.count("does not pay for the start: raise --time") == 3
    assert "gave up: 3 starts in a row that trained for less time than" in printed
    assert steps_logged(run) > 0
    assert re.search(r"note: .*mine.yaml was changed on .*, after this job was submitted", printed)


def test_stop_by_user_counts_as_no_fruitless_start(
    cluster: Cluster, data_arguments: list[str], tmp_path: Path
) -> None:
    """Each start is stopped at once, and takes longer to begin than it trains."""
    run = tmp_path / "run"
    how = [*data_arguments, "--training.max_steps=1000000", f"--run_dir={run}"]
    site = "RANKS_PER_NODE=1 MAX_FRUITLESS=0"
    job = cluster.sbatch("--nodes=1", *PRETRAIN, "cpu", *how, site=site)
    by_signal = ("scancel", "--batch", "--signal=USR1", job)
    for number, stop in enumerate([(run / "STOP").touch, lambda: cluster.run(*by_signal)]):
        logged = steps_logged(run)
        cluster.wait_until(lambda logged=logged: steps_logged(run) > logged, job=job)
        stop()
        cluster.wait_until(
            lambda number=number: int(cluster.job(job)["Restarts"]) > number, job=job
        )
    printed = cluster.output(job)
    cluster.run("scancel", job)
    cluster.wait(job)
    assert printed.count("not done yet") == 2
    assert "raise --time" not in printed


def test_job_is_requeued_after_passing_io_error(cluster: Cluster, tmp_path: Path) -> None:
    """The kernel answers a read of /proc/self/mem with EIO, as a file server may for a while."""
    site = "MAX_FRUITLESS=1"
    fails = "/proc/self/mem"
    (tmp_path / "tokenizer.json").symlink_to(fails)
    (tmp_path / "text.txt").write_text("Kant")
    where = ["--output", tmp_path / "shards", "--tokenizer", tmp_path]
    trains = cluster.sbatch("--nodes=1", PRETRAIN[0], fails, "cpu", site=site)
    tokenizes = cluster.sbatch(
        "--array=0",
        "--cpus-per-task=1",
        "slurm/tokenize.sbatch",
        "--input",
        tmp_path / "text.txt",
        *where,
        site=site,
    )
    for job, restarts, said in (
        (trains, "2", "could not look how far the run is"),
        (f"{tokenizes}_0", "1", "ended with 74"),
    ):
        ended = cluster.wait(job)
        assert (ended["ExitCode"], ended["Restarts"]) == ("1:0", restarts), cluster.all_logs()
        assert said in cluster.all_logs()
