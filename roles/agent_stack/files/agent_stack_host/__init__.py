"""The command `agent-stack` of a host: how the stack is, what became of a request, and what is wrong.

Standard library only, and Python 3.10, which is Ubuntu 22.04's. It changes nothing.
"""
