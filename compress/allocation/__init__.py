"""Who gets how much of one budget: an allocation is one file, see `base`."""
