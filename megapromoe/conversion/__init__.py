"""Checkpoints in other formats, and models made from models."""
