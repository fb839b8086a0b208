"""What a user brings: families, checkpoints, weights, tokenizers, text."""
