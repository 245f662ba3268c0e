"""The cluster: rank, node, time limit, signals."""
