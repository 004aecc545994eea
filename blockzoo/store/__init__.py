"""A zoo on a storage: objects by digest, refs by name and number, and the one way to write them."""
