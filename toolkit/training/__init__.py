"""From a mix to a trained adapter and its run folder."""
