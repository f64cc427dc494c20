"""What every family stands on: operations and backends, the compiled library, Triton, tuned numbers."""
