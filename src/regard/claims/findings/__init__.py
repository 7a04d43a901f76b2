"""Claims that are of no page: what papers say of whole families."""
