"""regard: a catalogue and workbench of attention for transformer models."""
