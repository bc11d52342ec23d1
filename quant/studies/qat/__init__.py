"""Fine-tune a transformer through its rounding (QAT), and say when that beats rounding alone."""
