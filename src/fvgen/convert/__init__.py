"""`fvgen convert`: other programs' checkpoints to model folders, and back."""
