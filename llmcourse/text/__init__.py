"""Text: tokenizers and data."""
