"""Cameras and point clouds. Knows nothing of the rest of the package."""
