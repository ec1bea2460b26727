"""Measurements of time that can be trusted."""
