"""Observe and schedule: callbacks read and log; Hardening alone sets aux_weights."""
