"""What a model says: sampling."""
