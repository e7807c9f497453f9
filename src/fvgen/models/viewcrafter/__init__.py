"""ViewCrafter's family of networks."""
