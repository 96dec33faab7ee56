"""One file for each kind of resource; a route is a few lines."""
