"""Describe a store: identity, rows, objects, bytes."""
