"""What every family stands on: operations, the compiled library, Triton, tuned numbers, matrix products."""
