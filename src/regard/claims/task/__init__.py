"""Claims of tasks."""
