"""Where a process runs, and until when: rank, node, time limit, signals."""
