"""Engines: a published model without HTTP around it."""
