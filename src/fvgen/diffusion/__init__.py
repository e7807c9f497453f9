"""Noise levels and samplers, as functions of tensors."""
