"""Swish (SiLU) and Mish."""
