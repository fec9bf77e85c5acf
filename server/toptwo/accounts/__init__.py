"""Who uses the server, what they may do, and what it costs them."""
