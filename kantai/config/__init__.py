"""What a run is: its settings, and the batch arithmetic that follows from them."""
