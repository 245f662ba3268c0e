"""Look at the nodes of a cluster before a run: GPUs, versions, clocks, disks, all-reduce. Prints a table; the exit code is 1 for bad nodes,
2 where all nodes lack the same.

python scripts/preflight.py --config configs/roberta-base.yaml

looks at this machine. In a SLURM job, started once a node, it compares them; slurm/pretrain.sbatch does so before every start.
"""

import argparse
import socket
import sys
import tempfile
from pathlib import Path

from kantai.config.loading import load_config
from kantai.errors import UserError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="of the run that is to follow; its settings may follow as --section.key=value")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder for caches on every node")
    parser.add_argument("--nodes", default=socket.gethostname().split(".")[0], help="names of all nodes, as n1,n2; default: this one")
    parser.add_argument("--bad_nodes", type=Path, help="file to write the names of bad nodes to, one a line; empty when all are good")
    arguments, overrides = parser.parse_known_args()
    config = load_config(arguments.config, overrides)
    from kantai.diagnostics import preflight  # imports torch, which bad input need not wait for

    number, address, port = preflight.rendezvous()
    nodes = arguments.nodes.split(",")
    found = preflight.exchange(preflight.inspect_node(nodes[number], Path(config.run_dir), arguments.scratch), nodes, number, address, port)
    if number > 0:
        return
    wrong = preflight.judge(found, nodes, preflight.run_gib(config))
    print(preflight.table(found, wrong), flush=True)
    common, bad = preflight.split(found, wrong)
    if common:
        raise UserError(f"on all nodes: {'; '.join(common)}")
    if arguments.bad_nodes is not None:
        arguments.bad_nodes.write_text("".join(f"{node}\n" for node in bad), encoding="utf-8")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    run_command(main)
