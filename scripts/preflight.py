"""Check the nodes of a cluster before a run: GPUs, versions, clocks, disks, all-reduce.

python scripts/preflight.py --config configs/roberta-base.yaml

checks this machine. In a SLURM job, started once on each node, it compares the nodes;
slurm/pretrain.sbatch does so before every start. It prints a table. The exit code is 1 when nodes
are bad, and 2 when all nodes lack the same.
"""

import argparse
import socket
import sys
import tempfile
from pathlib import Path

from kantai.config.loading import load_config
from kantai.errors import UserError, run_command


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        required=True,
        help="YAML file of the run; any key in it can be overridden by --section.key=value",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="folder for caches on every node (default: the temporary folder)",
    )
    parser.add_argument(
        "--nodes",
        default=socket.gethostname().split(".")[0],
        help="names of all nodes, as n1,n2 (default: this one)",
    )
    parser.add_argument(
        "--bad_nodes",
        type=Path,
        help="file for the names of bad nodes, one a line; it is empty when all are good",
    )
    return parser.parse_known_args()


def main() -> None:
    arguments, overrides = parse_arguments()
    config = load_config(arguments.config, overrides)
    # These import torch, which bad input need not wait for.
    from kantai.diagnostics import preflight
    from kantai.diagnostics.node import inspect_node

    number, address, port = preflight.rendezvous()
    nodes = arguments.nodes.split(",")
    facts = inspect_node(nodes[number], Path(config.run_dir), arguments.scratch)
    found = preflight.exchange(facts, nodes, number, address, port)
    if number > 0:
        return
    complaints = preflight.judge(found, nodes, preflight.run_gib(config))
    print(preflight.table(found, complaints), flush=True)
    common, bad = preflight.common_and_bad(found, complaints)
    if common:
        raise UserError(f"on all nodes: {'; '.join(common)}")
    if arguments.bad_nodes is not None:
        names = "".join(f"{node}\n" for node in bad)
        arguments.bad_nodes.write_text(names, encoding="utf-8")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    run_command(main)
