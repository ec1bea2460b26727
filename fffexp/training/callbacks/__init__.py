"""Observe and schedule: callbacks read and log; Schedules alone sets aux_weights."""
