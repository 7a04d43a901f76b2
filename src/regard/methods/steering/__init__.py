"""Steering: what a model attends to, adds up or says next."""
