"""`pytest benchmarks`: every operation against the seed formulation, torch's, torch.compile, peers."""
