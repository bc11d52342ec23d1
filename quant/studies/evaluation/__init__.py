"""Evaluate quantized transformers by their videos: who is better, by which judge, how surely."""
