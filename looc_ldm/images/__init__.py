"""Image sources and transforms: what training and commands both need."""
