"""The commands other than train and infer, and the code that all commands share."""
