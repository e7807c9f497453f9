"""`fvgen doctor`: what of this machine works, what is missing for which purpose, and the command for each cure."""
