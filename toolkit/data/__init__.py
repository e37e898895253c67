"""From a path or a Hub name to rows with labels, in the shares of the recipe."""
