"""Searches over layers: what a study file says, running it, and what came out."""
