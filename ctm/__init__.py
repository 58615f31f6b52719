"""Continuous Thought Machines."""
