"""Training of one run from its config: task, schedules, callbacks, several seeds at once."""
