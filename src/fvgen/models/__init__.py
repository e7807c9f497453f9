"""The networks: what a teacher family is, the denoisers built on one, and a folder for each family."""
