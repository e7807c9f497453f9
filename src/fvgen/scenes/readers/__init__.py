"""One file per family of formats; the table of all of them is in `fvgen.scenes.formats`."""
