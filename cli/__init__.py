"""The memos command."""
