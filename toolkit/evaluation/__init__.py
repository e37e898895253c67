"""Base against tuned, in every mode of the model, with intervals."""
