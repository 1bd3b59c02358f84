"""The commands other than train and infer, and what all of them share."""
