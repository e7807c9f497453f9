"""fvgen: distil slow video-diffusion models for novel-view synthesis into 4-step students."""

import logging
import os

__version__ = "0.2.0"

# Threads that wait spin, unless told otherwise before torch is loaded: beside other work a fit on two cores then takes
# ten times the processor seconds, for nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# accelerate imports an installed DeepSpeed as soon as a model is saved; without a GPU that writes a warning to stdout,
# in the middle of what a command prints.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def __getattr__(name):  # imported when first used: torch and diffusers take seconds
    if name == "generate":
        from fvgen.walks.run import generate

        return generate
    if name in ("open_scene", "walk"):
        from fvgen.walks import api

        return getattr(api, name)
    if name == "diagnose":
        from fvgen.diagnosis import diagnose

        return diagnose
    raise AttributeError(f"module 'fvgen' has no attribute {name!r}")
