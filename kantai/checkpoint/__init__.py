"""What is kept of a run, and which checkpoints are complete."""
