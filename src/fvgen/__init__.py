"""fvgen: distil slow video-diffusion models for novel-view synthesis into 4-step students."""

import logging

__version__ = "0.2.0.dev0"

# accelerate imports an installed DeepSpeed as soon as a model is saved; without a GPU that writes a warning to stdout,
# in the middle of what a command prints.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
