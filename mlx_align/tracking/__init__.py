"""Run folders: their files, the health checks of their metrics, and the verdict on a run."""
