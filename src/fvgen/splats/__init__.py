"""3D Gaussians fitted to posed views: `reconstruct` a data set, `fit` views in memory, read and write scene.ply."""

from fvgen.splats.fitting import FitSettings, fit
from fvgen.splats.ply import read_splat, write_splat
from fvgen.splats.reconstruct import reconstruct

__all__ = ["FitSettings", "fit", "read_splat", "reconstruct", "write_splat"]
