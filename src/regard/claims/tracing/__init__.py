"""Claims of tracing."""
