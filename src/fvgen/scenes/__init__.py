"""Posed photographs of a static scene, in any format that we know."""
