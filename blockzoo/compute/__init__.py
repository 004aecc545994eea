"""How the blocks of the families compute. Imports torch, as only `evaluation` does beside it in the zoo."""
