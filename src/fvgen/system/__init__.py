"""Files, processes, places: what every program needs."""
