"""The run page: a run folder as one HTML file that needs no network."""
