"""Your own model: what it leaks, from how large a batch, which defence stops it; a watch on a running federation."""
