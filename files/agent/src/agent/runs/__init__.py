"""Runs: accepted, worked on, followed, taken over and stored."""
