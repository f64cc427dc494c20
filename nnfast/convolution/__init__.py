"""Convolutions with what stands before and after them."""
