"""What this machine has, what fits it, and how to install what is missing."""
