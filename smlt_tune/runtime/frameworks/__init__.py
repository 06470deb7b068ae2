"""The seam to machine-learning frameworks: arrays in, arrays out."""
