"""Photographs and videos without poses to scenes."""
