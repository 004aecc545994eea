"""Keys and values: pages, which are free, and the prefix cache that shares them."""
