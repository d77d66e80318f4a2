"""Language models: loading them, adapters and heads, the forward pass, generation."""
