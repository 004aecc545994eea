"""Folders as Hugging Face and PEFT write them: what is read from them, and writing them back."""
