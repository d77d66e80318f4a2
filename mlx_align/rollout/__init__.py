"""What a model says, and what it is worth: sampling, rewards."""
