"""Preflight names the bad node. tests/integration/test_slurm.py breaks real nodes."""

from dataclasses import replace

from kantai.diagnostics.node import Facts, Folder
from kantai.diagnostics.preflight import common_and_bad, judge

NODES = ["n1", "n2", "n3"]
DISK = Folder("/shared/runs", free_gib=100.0, mib_per_second=500.0)
GOOD = [
    Facts(
        node,
        8,
        8,
        8,
        versions={"torch": "2.13"},
        run=DISK,
        scratch=DISK,
        sees=NODES,
        reduce_ranks="nccl x8",
        reduce_gib_per_second=300.0,
    )
    for node in NODES
]


def judge_third_node(**changes: object) -> dict[str, list[str]]:
    """Judge two good nodes and a third one with changed facts."""
    third = replace(GOOD[2], **changes)  # type: ignore[arg-type]
    return judge([*GOOD[:2], third], NODES, need_gib=10.0)


def test_good_nodes_get_no_complaints() -> None:
    assert judge(GOOD, NODES, need_gib=10.0) == {node: [] for node in NODES}


def test_differing_node_is_named_with_reason() -> None:
    for changes, why in (
        ({"gpus_found": 7, "gpus_for_torch": 7}, "7 of 8 GPUs"),
        ({"gpus_for_torch": 0}, "torch finds 0 of 8 GPUs"),
        ({"versions": {"torch": "2.12"}}, "torch 2.12, not 2.13"),
        ({"clock_seconds": -90.0}, "clock is -90.0 s off"),
        ({"run": replace(DISK, free_gib=9.0)}, "/shared/runs has less than 10.0 GiB free"),
        ({"scratch": replace(DISK, mib_per_second=1.0)}, "/shared/runs is slow"),
        ({"sees": ["n3"]}, "/shared/runs is a different folder on this node"),
        ({"reduce_gib_per_second": 100.0}, "slow GPU links"),
    ):
        wrong = judge_third_node(**changes)
        assert wrong == {"n1": [], "n2": [], "n3": [why]}
        assert common_and_bad(GOOD, wrong) == ([], ["n3"])


def test_silent_node_is_bad() -> None:
    assert judge(GOOD[:2], NODES, need_gib=10.0) == {"n1": [], "n2": [], "n3": ["does not answer"]}


def test_slow_disk_is_judged_against_working_disks() -> None:
    full = replace(DISK, mib_per_second=0.0, error="no space")
    # The speed of the full disk must not lower the median.
    for speed, complaints in (
        (60.0, []),
        (40.0, ["/shared/runs is slow"]),
    ):
        disks = [replace(DISK, mib_per_second=speed), replace(DISK, mib_per_second=900.0), full]
        found = [replace(facts, scratch=disk) for facts, disk in zip(GOOD, disks, strict=True)]
        assert judge(found, NODES, need_gib=10.0) == {
            "n1": complaints,
            "n2": [],
            "n3": ["no space"],
        }


def test_clock_offset_of_two_nodes_blames_neither() -> None:
    two = [GOOD[0], replace(GOOD[1], clock_seconds=3.0)]
    assert judge(two, NODES[:2], need_gib=10.0) == {"n1": [], "n2": []}


def test_fault_of_all_nodes_blames_none() -> None:
    found = [replace(facts, gpus_for_torch=0) for facts in GOOD]
    found[0] = replace(found[0], clock_seconds=90.0)
    assert common_and_bad(found, judge(found, NODES, need_gib=10.0)) == (
        ["torch finds 0 of 8 GPUs"],
        ["n1"],
    )


def test_full_run_directory_blames_no_node() -> None:
    alone = [
        replace(GOOD[0], run=replace(DISK, free_gib=9.0), gpu_errors=["GPU 3 has 2 memory errors"])
    ]
    wrong = judge(alone, ["n1"], need_gib=10.0)
    assert common_and_bad(alone, wrong) == (["/shared/runs has less than 10.0 GiB free"], ["n1"])

    filling = [
        replace(facts, run=replace(DISK, free_gib=free))
        for facts, free in zip(GOOD, (9.04, 9.06, 9.1), strict=True)
    ]
    assert common_and_bad(filling, judge(filling, NODES, need_gib=10.0)) == (
        ["/shared/runs has less than 10.0 GiB free"],
        [],
    )
