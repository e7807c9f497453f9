"""Clips: a render along a camera path and the true frames."""
