"""Measurements of memory_os on real data, and the learning of recall's weights: what ``memos bench`` runs."""
