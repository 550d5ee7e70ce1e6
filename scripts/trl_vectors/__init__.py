"""Vectors from the real TRL; see __main__.py."""
