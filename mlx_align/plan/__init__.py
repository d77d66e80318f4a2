"""Memory and time of a run before it starts, and the machine it would run on."""
