"""`pytest benchmarks`: every operation against the seed formulation, torch's own, torch.compile, and peers."""
