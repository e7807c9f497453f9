"""Scenes, clips and their cached latents."""
