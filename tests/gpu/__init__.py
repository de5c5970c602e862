"""What XLA compiles for a GPU, which need not be there."""
