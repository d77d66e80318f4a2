"""Using trained models: scoring, generation, and best-of-n reranking."""
