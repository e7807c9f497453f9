"""fvgen: distil slow video-diffusion models for novel-view synthesis into 4-step students."""

__version__ = "0.1.0"
