"""Atomic files and folders, and a cache of remote files."""
