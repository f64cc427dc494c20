"""Batch norm, residual and activation in one pass."""
