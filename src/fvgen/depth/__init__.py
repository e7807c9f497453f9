"""One module for each source of depth, with two functions: ``lacks(scene)`` and ``run(scene, views, height, width)``.

`fvgen.depth.maps` has the table of them.
"""
