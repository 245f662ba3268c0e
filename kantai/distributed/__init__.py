"""How an update is done on N ranks. The only place that knows Accelerate and DeepSpeed."""
