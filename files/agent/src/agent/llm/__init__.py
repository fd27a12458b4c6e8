"""The language model and the graph that asks it."""
