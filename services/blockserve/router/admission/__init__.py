"""Who gets in, and when the others should come back."""
