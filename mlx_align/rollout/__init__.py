"""What a model says, what that earns, and what is to be learned from it."""
