"""Claims on steering pages."""
