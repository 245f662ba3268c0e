"""Checks of nodes before a run, proof of the promises, and chaos for runs."""
