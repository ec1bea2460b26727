"""Feedforward layers in models that exist: find, replace, distil."""
