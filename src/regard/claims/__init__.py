"""Claims: one file per row of the catalogue, each with the paper's claim and how it is measured here."""
