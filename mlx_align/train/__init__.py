"""Training: objectives, the loop, the run folder."""
