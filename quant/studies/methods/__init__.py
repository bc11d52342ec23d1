"""Compare ways to quantize a transformer: number formats, granularities, rounding, transforms."""
