"""One file a schema step, never edited after a release."""
