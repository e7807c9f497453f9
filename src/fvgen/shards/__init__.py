"""Encoded training clips at scale."""
