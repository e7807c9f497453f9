"""Photographs in, walk-through out: poses, points, a path, renders along it, video, a data set of all views."""
