"""`mlx-align selftest`: is training on this machine's GPU right, and how much does it need."""
