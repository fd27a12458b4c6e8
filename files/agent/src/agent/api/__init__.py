"""What HTTP sees: the routes, what they take and answer, and what is around every request."""
