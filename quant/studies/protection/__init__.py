"""Find the blocks that suffer from quantization, and test sets of protected blocks."""
