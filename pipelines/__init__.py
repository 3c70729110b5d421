"""Middle layer: the stages from raw data to a published model, and their parts."""
