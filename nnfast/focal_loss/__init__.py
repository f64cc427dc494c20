"""Focal loss, softmax and sigmoid."""
