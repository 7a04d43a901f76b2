"""Claims: one file per row of the catalogue, in the folder of its page's kind, and beside it what was measured last."""
