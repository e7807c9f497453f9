"""CogVideoX's family: diffusers' image-to-video transformer and 3D VAE."""
