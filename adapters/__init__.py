"""What we talk to."""
