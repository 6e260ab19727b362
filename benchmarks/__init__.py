"""Measurements of the real thing; each is a script that prints a table and fails where a promise is not kept."""
