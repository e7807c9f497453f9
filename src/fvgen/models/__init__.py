"""The networks: ViewCrafter's UNet and image projector, and the denoisers built on them."""

from fvgen.models.conditioning import ImageProjector
from fvgen.models.teacher import Condition, Denoiser, Teacher
from fvgen.models.unet import ViewCrafterUNet

__all__ = ["Condition", "Denoiser", "ImageProjector", "Teacher", "ViewCrafterUNet"]
