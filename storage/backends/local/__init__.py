"""Files of this machine, and mounted volume claims."""
