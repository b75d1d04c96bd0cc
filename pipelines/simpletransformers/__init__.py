"""The drop-in for Simple Transformers: its arguments, data forms, return values and folders."""
