"""How a step is done on N ranks. The only place that knows Accelerate and DeepSpeed."""
